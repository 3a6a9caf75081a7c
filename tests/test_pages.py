"""The pages of the methods: a finished run is read, a missing or failed one is made."""

import pytest

from afen import runs
from afen.people import write_tree
from afen.records import read_record, write_record

TINY = {"dataset": "regdb", "preset": "pocket", "precision": "float32", "epochs": 1}
TINY |= {"steps": 1, "identities": 2, "images": 2}


@pytest.fixture
def plan(tmp_path):
    """The smallest of runs, on a tree of its own."""
    size = {"n_train": 4, "n_test": 3, "n_images": 2, "size": (48, 24)}
    root = write_tree("regdb", tmp_path / "tree", **size)
    places = {"root": str(root), "out": str(tmp_path / "run")}
    return runs.make_plan(runs.DEFAULTS | TINY | places)


def test_a_missing_run_is_made_and_a_finished_one_is_read(plan, monkeypatch):
    folder = runs.finished(plan)
    first = read_record(folder / "record.json")
    assert folder == plan.folder and first["status"] == "smoke" and first["scores"]
    assert (folder / "weights.safetensors").exists()
    monkeypatch.setattr(runs, "start", None)  # nothing can train from here on
    assert read_record(runs.finished(plan) / "record.json") == first


def test_a_failed_run_is_made_again(plan):
    first = read_record(runs.finished(plan) / "record.json")
    write_record(first | {"status": "failed", "reason": "did not finish"}, plan.folder)
    again = read_record(runs.finished(plan) / "record.json")
    assert again["status"] == "smoke" and again["scores"] == first["scores"]


def test_the_pictures_of_a_run_are_small(plan):
    curves, lists = runs.pictures(runs.finished(plan))
    assert [line.get_label() for line in curves.axes[0].get_lines()][0] == "total"
    assert runs.figures.is_smoke(curves) and lists.width <= runs.PAGE_WIDTH
