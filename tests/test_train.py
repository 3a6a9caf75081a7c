"""train.ipynb as people run it: through papermill's command line, on written trees."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
import torch
from safetensors import safe_open

from afen.people import write_tree
from afen.records import read_record
from afen.runs import DEFAULTS, PARAMETERS, carry_out, make_plan, open_data, start
from afen.training import (
    check_precision,
    load_checkpoint,
    precision_words,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parent.parent
PAPERMILL = Path(sys.executable).with_name("papermill")
QUICK = {"preset": "pocket", "epochs": 2, "steps": 1, "identities": 2, "images": 2}
SETTINGS = {
    "regdb": {"visible-to-infrared", "infrared-to-visible"},
    "sysu": {"all-single", "all-multi", "indoor-single", "indoor-multi"},
    "llcm": {"visible-to-infrared", "infrared-to-visible"},
    "folder": {"visible-to-infrared", "infrared-to-visible"},
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """A small rendered tree in each layout."""
    folder = tmp_path_factory.mktemp("trees")
    size = {"n_train": 4, "n_test": 4, "n_images": 2, "size": (48, 24)}
    return {name: write_tree(name, folder / name, **size) for name in SETTINGS}


def command(output, **parameters):
    """The papermill command that runs train.ipynb with these parameters, on the CPU.

    On a GPU two runs of one command are only nearly the same.
    """
    words = [PAPERMILL, "--no-progress-bar", ROOT / "nbs" / "train.ipynb", output]
    for name, value in ({"device": "cpu"} | parameters).items():
        words += ["-p", name, str(value)]
    return [str(word) for word in words]


def train(folder, **parameters):
    """Run train.ipynb to its end; returns the finished process."""
    words = command(folder / "out.ipynb", out=folder / "run", **parameters)
    return subprocess.run(
        words, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT
    )


def printed(book):
    """What the cells of a notebook print, as one text."""
    outputs = [out for cell in book["cells"] for out in cell.get("outputs", [])]
    return "".join("".join(out.get("text", "")) for out in outputs)


def last_line(process):
    return process.stderr.strip().splitlines()[-1]


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, key="a", epoch=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # a disk soon full
    try:
        with pytest.raises(OSError, match="could not be written, .* MB are free there"):
            save_checkpoint(path, key="a", epoch=2, weights=torch.zeros(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(path, "a")["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dataset", SETTINGS)
def test_every_layout_trains_and_leaves_a_whole_run(trees, tmp_path, dataset):
    done = train(tmp_path, dataset=dataset, root=trees[dataset], **QUICK)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    record = read_record(run / "record.json")
    assert record["status"] == "smoke" and set(record["scores"]) == SETTINGS[dataset]
    expected = 10 if dataset in ("sysu", "llcm") else 1
    assert {entry["n"] for entry in record["scores"].values()} == {expected}
    assert len(pd.read_csv(run / "metrics.csv")) == 2
    assert not (run / "checkpoint.pt").exists()  # done with
    with safe_open(run / "weights.safetensors", "pt") as weights:
        assert weights.metadata()["run"] == record["id"] and len(list(weights.keys()))
    figures = {p.name for p in (run / "figures").iterdir()}
    for name in ("loss_curves", "learning_rate", "cmc_curve", "distance_histograms"):
        assert {f"smoke_{name}.{kind}" for kind in ("svg", "png", "csv")} <= figures
    for _ in range(100):  # it is copied when papermill has ended
        if (run / "notebook.ipynb").exists():
            break
        time.sleep(0.1)
    book = nbformat.read(run / "notebook.ipynb", as_version=4)
    said = printed(book)
    assert "Rank-1" in said and "report.html" in book.cells[-1].outputs[-1]["text"]
    assert "\r" not in said and len(said.splitlines()) < 40  # no bar, as it is no terminal
    assert [f"epoch={epoch}, " in said for epoch in range(3)] == [True, True, False]
    assert said.count("\nQueries without a match, ") == (dataset == "sysu")
    assert (run / "report.html").stat().st_size < 5e6


@pytest.mark.parametrize(
    "parameters, sentence",
    [
        ({"datset": "regdb"}, "did you mean 'dataset'?"),
        ({"dataset": "regbd"}, "did you mean 'regdb'?"),
        ({"epochs": "two"}, "Parameter epochs is 'two' (str)"),
        ({"flip": "false"}, "it must be True or False"),
        ({"split": 11}, "between 1 and 10"),
        ({"mecs_after": "layer7"}, "Unknown mecs_after 'layer7'"),
        ({"precision": "auto"}, "Unknown precision 'auto'"),
        ({"method": "caj", "mecs": "paper"}, "Method caj has no 'mecs'"),
        ({"dataset": "regdb", "root": "nowhere"}, "pocket-regdb"),
        ({"weights": "nowhere.pt"}, "Weights file nowhere.pt does not exist"),
        ({"device": "cuda:9"}, "not available on this machine"),
    ],
)
def test_a_wrong_run_ends_with_its_sentence(trees, tmp_path, parameters, sentence):
    given = {"dataset": "regdb", "root": trees["regdb"], **QUICK} | parameters
    done = train(tmp_path, **given)
    assert done.returncode != 0
    assert sentence in last_line(done)


def test_corrupt_images_are_listed_before_training(trees, tmp_path):
    tree = write_tree("regdb", tmp_path / "tree", n_train=4, n_test=4, n_images=2)
    broken = sorted(tree.glob("Visible/*/*.bmp"))[:2]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    done = train(tmp_path, dataset="regdb", root=tree, **QUICK)
    assert done.returncode != 0
    said = done.stderr[done.stderr.rindex("ValueError") :]
    for path in broken:
        assert path.relative_to(tree).as_posix() in said
    assert not (tmp_path / "run").exists()


def test_a_killed_run_goes_on_and_ends_the_same(trees, tmp_path):
    given = {"dataset": "regdb", "root": trees["regdb"], **QUICK, "epochs": 6}
    given |= {"precision": "float32", "steps": 3}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert train(whole, **given).returncode == 0
    words = command(killed / "out.ipynb", out=killed / "run", **given)
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    deadline = time.time() + 600
    while not (killed / "run" / "checkpoint.pt").exists():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)  # the kernel too
    for one in (process, *family):
        one.kill()
    process.wait()
    assert read_record(killed / "run" / "record.json")["status"] == "failed"
    done = train(killed, **given)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (
        read_record(folder / "run" / "record.json") for folder in (whole, killed)
    )
    assert first["scores"] == second["scores"]
    log = (killed / "out.ipynb").read_text()
    assert "Going on from epoch" in log


def test_the_short_form_works_where_papermill_accepts_it(trees):
    words = [str(PAPERMILL), "nbs/train.ipynb", "-p", "dataset", "regdb"]
    words += ["-p", "root", str(trees["regdb"])]
    for name, value in QUICK.items():
        words += ["-p", name, str(value)]
    done = subprocess.run(
        words, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    book = json.loads(done.stdout)
    assert "Rank-1" in printed(book)


def test_the_manual_lists_every_parameter():
    words = [str(PAPERMILL), "--help-notebook", "nbs/train.ipynb"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    for name in PARAMETERS:
        assert f"  {name}: " in done.stdout, name


def test_the_parameters_cell_holds_the_defaults():
    book = nbformat.read(ROOT / "nbs" / "train.ipynb", as_version=4)
    cell = next(c for c in book.cells if "parameters" in c.metadata.get("tags", []))
    names: dict = {}
    exec("from typing import Optional\n" + cell.source, names)
    assert {name: names[name] for name in DEFAULTS} == DEFAULTS


def test_a_label_that_noise_takes_away_keeps_its_output(tmp_path):
    root = write_tree("regdb", tmp_path / "tree", n_train=8, n_test=4, n_images=2)
    given = {"dataset": "regdb", "root": str(root), "out": str(tmp_path / "run")}
    given |= {**QUICK, "label_noise": 0.9, "precision": "float32"}
    for seed in range(50):  # until a label has no image left
        plan = make_plan(DEFAULTS | given | {"seed": seed})
        data = open_data(plan)
        table = data.split.train
        if table.label.nunique() < table.identity.nunique():
            break
    else:
        raise AssertionError("no seed takes a label away: raise the noise")
    run = start(plan, data)
    assert run.method.n_identities == table.identity.nunique()


def test_slow_bfloat16_is_refused_before_any_data_are_read(tmp_path):
    """On any processor, as torch is told that it has no AVX-512."""
    given = {"dataset": "regdb", "root": tmp_path / "nowhere", "precision": "bfloat16"}
    done = subprocess.run(
        command(tmp_path / "out.ipynb", out=tmp_path / "run", **given),
        capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT,
        env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "Device cpu has no fast bfloat16" in last_line(done)
    assert last_line(done).count(". ") == 0 and not (tmp_path / "run").exists()


def test_any_machine_reads_the_plan_of_a_run_in_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    plan = make_plan(DEFAULTS | {"precision": "bfloat16"})
    assert plan.parameters["precision"] == plan.recipe.precision == "bfloat16"
    assert "precision" not in plan.parameters["recipe"]
    with pytest.raises(ValueError, match="no fast bfloat16"):
        start(plan, None)
    with pytest.raises(ValueError, match="no fast bfloat16"):
        carry_out(plan)


@pytest.mark.parametrize("capability, tf32, precision, words", [
    ((9, 0), True, "float32", "float32 with TF32 convolutions"),
    ((9, 0), False, "float32", "float32"),
    ((7, 5), True, "float32", "float32"),
    ((9, 0), True, "bfloat16", "bfloat16"),
])  # fmt: skip
def test_a_gpu_is_named_with_what_it_makes_of_float32(
    monkeypatch, capability, tf32, precision, words
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    device = torch.device("cuda")
    assert precision_words(device, precision) == words
    check_precision(device, "float32")
    if capability < (8, 0):
        with pytest.raises(ValueError, match="Device cuda has no fast bfloat16"):
            check_precision(device, "bfloat16")
    else:
        check_precision(device, "bfloat16")
