"""Runs that are killed at random moments, through papermill, and what is left of them."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil

from afen.core import keyed_rng
from afen.people import write_tree
from afen.records import read_record

ROOT = Path(__file__).resolve().parent.parent
PAPERMILL = Path(sys.executable).with_name("papermill")
METHODS = ("afen", "agw", "caj", "dart", "ddag", "pmt", "spot", "xmodal")
TINY = {"dataset": "regdb", "preset": "pocket", "epochs": 2, "steps": 2, "identities": 2}
TINY |= {"images": 2, "height": 32, "width": 16, "device": "cpu"}


def make_tree(folder):
    """The smallest rendered RegDB on which all methods train."""
    return write_tree("regdb", folder, n_train=4, n_test=3, n_images=4, size=(48, 24))


def command(method, tree, folder):
    """The papermill command of a tiny run in a folder."""
    words = [PAPERMILL, "--no-progress-bar", ROOT / "nbs" / "train.ipynb"]
    words += [folder.with_suffix(".ipynb")]
    for name, value in TINY.items() | {("method", method), ("root", tree), ("out", folder)}:
        words += ["-p", name, value]
    return [str(word) for word in words]


def begin(method, tree, folder):
    """Start a tiny run; its process."""
    words, quiet = command(method, tree, folder), subprocess.DEVNULL
    return subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=subprocess.PIPE, cwd=ROOT)


def kill(process):
    """SIGKILL papermill and its kernel at once, as a power cut would; True if it ran."""
    with suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid)]
        family += family[0].children(recursive=True)
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    running = process.wait() < 0
    process.stderr.close()
    return running


def finish(process):
    """Wait for a run; AssertionError with its last words if it failed."""
    said = process.communicate()[1].decode()
    assert process.returncode == 0, said[-600:]


def stage(folder):
    """How far a killed run had come, by what it left."""
    if not (folder / "record.json").exists():
        return "before training"
    if read_record(folder / "record.json")["status"] != "failed":
        return "after its record"
    epochs = (folder / "metrics.csv").exists()
    return "after an epoch" if epochs else "in the first epoch"


def traces(folder):
    """What must be equal, bit for bit: weights, and scores of the record."""
    record = read_record(folder / "record.json")
    return (folder / "weights.safetensors").read_bytes(), record["scores"]


def whole_run(method, tree, folder):
    """A run that nothing disturbs: its seconds and its traces."""
    begun = time.monotonic()
    finish(begin(method, tree, folder))
    return time.monotonic() - begun, traces(folder)


def killed_run(method, tree, folder, moment):
    """Kill a run `moment` seconds after its start, run its command again.

    Returns the stage, whether it was killed while it ran, and the traces of the end.
    """
    process = begin(method, tree, folder)
    with suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    ran = kill(process)
    reached = stage(folder)
    for draft in folder.rglob(".*"):  # a minute passes: younger ones may be another process's
        os.utime(draft, (0, 0))
    finish(begin(method, tree, folder))
    drafts = [p.name for p in folder.rglob(".*")]
    assert not drafts, f"half-written files are left: {drafts}"
    return reached, ran, traces(folder)


def moments(method, seed, seconds):
    """When to kill: uniformly over a whole run of so many seconds, without end."""
    rng = keyed_rng("kill", method, seed)
    while True:
        yield float(rng.uniform(0.02, 0.98) * seconds)


def kills(folder, n, seed, until=np.inf, methods=METHODS):
    """Kill and resume n runs, in turn over the methods; yield a row for each.

    Ends early once time.monotonic() is past `until`.
    """
    tree = make_tree(folder / "tree")
    whole, when = {}, {}
    for number in range(n):
        if time.monotonic() > until:
            return
        method = methods[number % len(methods)]
        if method not in whole:
            seconds, whole[method] = whole_run(method, tree, folder / f"{method}-whole")
            when[method] = moments(method, seed, seconds)
        moment = next(when[method])
        reached, ran, left = killed_run(method, tree, folder / f"{method}-{number}", moment)
        yield {"method": method, "seconds": round(moment, 1), "stage": reached,
               "running": ran, "equal": left == whole[method]}  # fmt: skip
