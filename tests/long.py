"""Trust, the long form: python -m tests.long [PART ...], with the parts below.

Each part leaves one record of what was tried and how it ended under data/records/trust.
"""

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path

from afen.core import cpu_name
from afen.records import code_revision, package_versions

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "data" / "records" / "trust"


def kills(folder, given):
    """Runs that are killed: where they were, and how many ended bit-equal."""
    until, rows = time.monotonic() + 60 * given.patience, []
    for row in import_module("tests.long_kills").kills(folder, given.kills, given.seed, until):
        rows.append(row)
        print(row, flush=True)
    faults = [f"{row['method']} does not end bit-equal" for row in rows if not row["equal"]]
    return {
        "asked_for": given.kills,
        "kills": len(rows),
        "while_running": sum(row["running"] for row in rows),
        "bit_equal": sum(row["equal"] for row in rows),
        "methods": dict(Counter(row["method"] for row in rows)),
        "stages": dict(Counter(row["stage"] for row in rows)),
        "faults": faults,
        "each": rows,
    }


def broken(folder, given):
    """Data sets that are broken: loaded right, refused, or silently wrong."""
    return import_module("tests.long_broken").try_trees(folder, given.trees, given.seed)


def fuzz(folder, given):
    """Bytes that no reader expects."""
    return import_module("tests.long_fuzz").fuzz(folder, 60 * given.minutes, given.seed)


def properties(folder, given):
    """Hypothesis, as long as it is given."""
    return import_module("tests.long_fuzz").properties(60 * given.minutes, given.seed)


def numerics(folder, given):
    """Each method's step in three precisions."""
    return import_module("tests.long_numerics").numerics(folder, given.seed)


def package(folder, given):
    """A wheel, an empty environment, nbdev 3, licences."""
    return import_module("tests.long_package").package(folder)


EVERY = (package, broken, fuzz, properties, numerics, kills)
PARTS = {part.__name__: part for part in EVERY}


def measure(name, given):
    """One part, and under which circumstances it was tried."""
    begun, clock, used = datetime.now(timezone.utc), time.monotonic(), sum(os.times()[:4])
    with tempfile.TemporaryDirectory() as folder:
        outcome = PARTS[name](Path(folder), given)
    return {
        "part": name,
        "seed": given.seed,
        "started": begun.isoformat(timespec="seconds"),
        "minutes": round((time.monotonic() - clock) / 60, 1),
        "processor_minutes": round((sum(os.times()[:4]) - used) / 60, 1),
        "code": code_revision(),
        "packages": package_versions(),
        "machine": cpu_name(),
    } | outcome


def main(words=None):
    """Try the parts, write their records; the number of faults."""
    parser = argparse.ArgumentParser(prog="python -m tests.long", description=__doc__)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--kills", type=int, default=60, help="runs to kill")
    parser.add_argument("--patience", type=float, default=600, help="minutes of killing")
    parser.add_argument("--trees", type=int, default=150, help="data sets to break")
    parser.add_argument("--minutes", type=float, default=10, help="of fuzz, of properties")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER)
    given, n_faults = parser.parse_args(words), 0
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.parts or PARTS:
        record = measure(name, given)
        (given.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{name}: {record['minutes']} minutes", *record["faults"], sep="\n  ")
        n_faults += len(record["faults"])
    return n_faults


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
