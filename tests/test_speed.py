"""Table 1's watched column, and what a dry run says of a GPU: with made-up records."""

import json
import os
import re
import subprocess

import pytest
from test_decisions import NBS, ROOT, cells
from test_workflow import project, words

from afen import grid
from afen.records import fingerprint, new_record, score_entry

STEP = {"ok": True, "seconds": 0.1, "peak GB": 9.0}
DEVICE = "NVIDIA Made-Up 16GB"


def gpu_record(**changes):
    """A record of `make check-gpu` with every method's step."""
    checks = {f"step {name} float32": dict(STEP) for name in grid.METHODS}
    about = {"device": DEVICE, "started": "2026-01-02T03:04:05+00:00", "driver": "550"}
    return about | {"checks": checks | {"evaluation": {"ok": True}}} | changes


def run_page(name, folder):
    """The Markdown that a page's cells put out with records of another folder."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    texts = []
    for cell in cells(NBS / f"{name}.ipynb", "code"):
        source = "".join(cell["source"])
        if source.startswith("#| notest"):
            continue
        if "parameters" in cell["metadata"].get("tags", []):
            source = f"records = {str(folder)!r}\nout = ''"
        done = shell.run_cell(source)
        done.raise_error()
        bundle, _ = shell.display_formatter.format(done.result)
        texts.append(bundle.get("text/markdown", ""))
    return texts


# --- Table 1 ---------------------------------------------------------------------------


def whole_record(job, watched):
    """A finished run on real data whose history was watched in some epochs."""
    record = new_record(job.parameters, {"hash": "", "protocol": "regdb", "rendered": False})
    mean = {"mean": dict.fromkeys(grid.METRICS, 0.5) | {"rank5": 0.5}}
    names = (*grid.METRICS, "rank5")
    summary = {name: {"mean": 0.5, "std": None} for name in names}
    entry = score_entry(summary, [mean["mean"]], "splits", 9, 9)
    record |= {"status": "full", "reason": "", "history": [{"epoch": 0, "loss": 1.0}, *watched]}
    record |= {"scores": dict.fromkeys(grid.SETTINGS["regdb"], entry)}
    return record | {"fingerprint": fingerprint(record)}


@pytest.fixture(scope="module")
def watched_table(tmp_path_factory):
    """Table 1's page on three runs: CAJ and PMT watched, AGW not."""
    folder = tmp_path_factory.mktemp("records")
    rows = [
        {"epoch": 1, "watched_rank1": 0.6, "watched_mAP": 0.55},
        {"epoch": 3, "watched_rank1": 0.58, "watched_mAP": 0.7},
    ]
    for method, history in (("caj", rows), ("pmt", rows), ("agw", [])):
        (job, *_) = [
            j for j in grid.jobs("paper", ["rows"]) if (j.label, j.dataset) == (method, "regdb")
        ]
        (folder / f"{job.id}.json").write_text(json.dumps(whole_record(job, history)))
    (text,) = [text for text in run_page("table1", folder) if "watched best" in text]
    lines = [[word.strip() for word in line.split("|")[1:-1]] for line in text.splitlines()]
    return {(line[0], line[1]): line for line in lines}


def test_the_watched_best_stands_beside_the_last_epoch(watched_table):
    line = watched_table["CAJ", "RegDB"]
    assert line[4:6] == ["50.00", "60.00 (1 of 1 runs)"], "CAJ's script chooses by Rank-1"
    assert line[7:9] == ["50.00", "55.00 (1 of 1 runs)"], "and mAP is that of the same epoch"


def test_pmts_script_chooses_by_map(watched_table):
    line = watched_table["PMT", "RegDB"]
    assert (line[5], line[8]) == ("58.00 (1 of 1 runs)", "70.00 (1 of 1 runs)")


def test_a_run_that_was_not_watched_says_so(watched_table):
    assert watched_table["AGW", "RegDB"][4:6] == ["50.00", "not watched"]
    assert watched_table["AGW", "SYSU-MM01"][4:6] == ["not run", "not run"]


# --- the dry run -----------------------------------------------------------------------

ROWS = grid.jobs("paper", ["rows"])
OURS = grid.GPU(DEVICE, 16.0, "550.1")


def test_records_of_gpus_are_kept_or_of_this_machine_the_newest_last(tmp_path):
    for name, day in (("data/records/gpu/a.json", "03"), ("runs/gpu-b.json", "02")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"started": f"2026-01-{day}"}))
    assert [r["started"][-2:] for r in grid.gpu_records(tmp_path)] == ["02", "03"]


def test_hours_per_row_are_those_of_the_gpu_at_hand():
    others = gpu_record(device="another", started="2026-02-01")
    text = "\n".join(grid.gpu_text(ROWS, OURS, [gpu_record(), others]))
    steps = 100 * (22258 // 32 + 1)
    (line,) = [line for line in text.splitlines() if re.match(r" *afen +sysu", line)]
    assert line.split()[2:] == ["1", str(steps), "0.1", f"{steps / 36000:.1f}",
                                f"{steps / 36000:.1f}", "9.0"]  # fmt: skip
    assert "driver 550.1" in text and "2026-01-02" in text and "it fits" in text


def test_what_was_cut_off_or_wrong_is_not_priced():
    record = gpu_record()
    record["checks"]["step caj float32"] = {"ok": None, "why": "not run: the time was over"}
    record["checks"]["step afen float32"]["ok"] = False
    text = "\n".join(grid.gpu_text(ROWS, OURS, [record]))
    assert text.count("not measured") > 3 and "4 rows that were not measured" in text
    assert "too large" not in text
    small = grid.gpu_text(ROWS, grid.GPU(DEVICE, 8.0, ""), [record])
    assert "it does not fit" in small[-1]


def test_a_gpu_without_a_record_is_told_what_to_do():
    (line,) = grid.gpu_text(ROWS, OURS, [gpu_record(device="another")])
    assert "make check-gpu" in line and DEVICE in line


def test_without_a_gpu_one_sentence(monkeypatch):
    monkeypatch.setattr(grid, "driver_version", lambda: "")
    (line,) = grid.gpu_text(ROWS, None, [gpu_record()])
    assert line.startswith("No GPU that torch can use is at hand:") and line.count(".") == 1
    monkeypatch.setattr(grid, "driver_version", lambda: "470.9")
    assert "the driver is 470.9" in grid.gpu_text(ROWS, None, [])[0]


def test_data_weights_and_disk_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(grid.torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(grid, "require_root", lambda name: tmp_path / name)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet50-0676ba61.pth").touch()
    data, more, resnet, vit, disk = grid.needs_text(ROWS, tmp_path)
    assert data == f"Data: regdb is at {tmp_path / 'regdb'}." and "sysu" in more
    assert "resnet50-0676ba61.pth is there" in resnet and "is not there" in vit
    assert re.match(r"Disk: about \d+ GB are needed, \d+ GB are free", disk)


def test_the_disk_holds_each_size_of_each_split_once():
    one = [j for j in ROWS if j.dataset == "regdb" and j.split == 1 and j.label == "caj"]
    ten = [j for j in ROWS if j.dataset == "regdb" and j.label == "caj"]
    both = [j for j in ROWS if j.dataset == "regdb" and j.label in ("caj", "afen")]
    packed = 8240 * 288 * 144 * 3 / 1e9
    first, many, two = map(grid.disk_gigabytes, (one, ten, both))
    assert 9 * packed < many - first < 9 * (packed + 0.15)
    assert two - many < 10 * 0.15 + 0.5, "AFEN's images are CAJ's"


def test_the_dry_run_of_the_paper_begins_with_what_is_ready(tmp_path):
    """Of Snakemake's own words the plan is left, and a failure keeps its code."""
    folder = project(tmp_path)
    script = ["sh", str(ROOT / "workflow" / "dry_run.sh")]
    rest = {"cwd": folder, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    rest["env"] = os.environ | {"PYTHONPATH": str(ROOT)}
    given = {"preset": "paper", "datasets": "regdb", "methods": "caj", "seeds": "0"}
    done = subprocess.run([*script, *words("-n", **given)], **rest)
    assert done.returncode == 0, done.stdout[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    runs = [line for line in lines if line.startswith("regdb-caj-paper-")]
    pages = [line for line in lines if line.startswith("runs/reproduce/")]
    assert len(runs) == 10 and len(pages) == 5
    first = [line.split(":")[0].split()[0] for line in lines if line not in (*runs, *pages)]
    gpu, *needs, last = first
    assert gpu in ("No", "GPU") and needs[-3:] == ["Data", "Weights", "Disk"]
    assert last == "10" and lines[-1].startswith("10 runs: 10 to run.")
    failed = subprocess.run([*script, "sh", "-c", "echo no such thing; exit 3"], **rest)
    assert (failed.returncode, failed.stdout) == (3, "no such thing\n")


# --- the page --------------------------------------------------------------------------


def test_the_code_of_the_page_is_folded():
    for cell in cells(NBS / "speed.ipynb", "code"):
        assert cell["metadata"].get("jupyter") == {"source_hidden": True}


def test_the_page_reads_a_gpus_record_and_says_what_was_not_measured(tmp_path):
    (tmp_path / "gpu").mkdir()
    record = gpu_record()
    record["checks"]["step afen bfloat16"] = {"ok": None, "why": "not run: the time was over"}
    (tmp_path / "gpu" / "made_up.json").write_text(json.dumps(record))
    texts = run_page("speed", tmp_path)
    (targets,) = [text for text in texts if "targets:" in text]
    assert "0 met, 0 missed" in targets
    (gpu,) = [text for text in texts if DEVICE in text]
    assert f"**{DEVICE}**, 2026-01-02: 9 checks right, 0 wrong, 1 cut off." in gpu
    (afen,) = [line for line in gpu.splitlines() if line.startswith(f"| {DEVICE} | afen ")]
    assert "0.100" in afen and "not run: the time was over" in afen
    assert "Hours of Table 1's rows" in gpu


def test_a_made_up_measurement_meets_or_misses_its_target(tmp_path):
    (tmp_path / "speed").mkdir()
    rows = [
        {"case": "RegDB, one direction", "variant": "released algorithm", "seconds": 10.0},
        {"case": "RegDB, one direction", "variant": "ours", "seconds": 0.1},
        {"case": "training step", "variant": "CAJ", "seconds": 1.0},
        {"case": "training step", "variant": "AFEN", "seconds": 1.5},
    ]
    path, *_ = (ROOT / "data" / "records" / "speed").glob("*.json")
    record = json.loads(path.read_text()) | {"rows": rows}
    (tmp_path / "speed" / "one.json").write_text(json.dumps(record))
    older = record | {"started": "2020", "rows": [rows[1] | {"seconds": 9.0}]}
    (tmp_path / "speed" / "older.json").write_text(json.dumps(older))
    (text,) = [text for text in run_page("speed", tmp_path) if "targets:" in text]
    assert "1 met, 1 missed, 7 not measured" in text, "the newest record counts"
    assert "| RegDB, one direction | released algorithm | ≥ 60 x | 100.00 x | met |" in text


def test_kept_records_of_speed_name_their_machine_and_code():
    for path in (ROOT / "data" / "records" / "speed").glob("*.json"):
        record = json.loads(path.read_text())
        assert record["rows"] and record["command"] and len(record["code"]["revision"]) == 40
        machine = record["machine"]
        assert machine["processor"] and machine["threads"] == 1 and len(machine["load"]) == 3
        for row in record["rows"]:
            assert row.get("why") or row["seconds"] > 0
