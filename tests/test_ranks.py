"""Several processes, here two on one processor: the step and the run of a single one."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from on_ranks import CASES
from safetensors.torch import load_file

from afen.people import write_tree
from afen.ranks import check_processes, in_order, share_of
from afen.records import read_record
from afen.runs import DEFAULTS, carry_out, main, make_plan, open_data, start

ROOT = Path(__file__).resolve().parent.parent
QUICK = {
    "preset": "pocket", "precision": "float32", "epochs": 3, "steps": 2, "identities": 2,
    "images": 2, "height": 64, "width": 32, "lr": 1e-3, "method": "agw", "device": "cpu",
}  # fmt: skip


def finished(*words):
    """Run Python with these words; returns what it printed."""
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def gaps(tmp_path_factory):
    """How far a step of two processes is from that of one, by case."""
    path = tmp_path_factory.mktemp("ranks") / "gaps.json"
    finished("tests/on_ranks.py", path)
    return json.loads(path.read_text())


@pytest.mark.parametrize("case", [f"{name}-{epoch}" for name, epoch in CASES])
def test_two_processes_take_the_step_of_one(gaps, case):
    """Losses, gradients, weights and running statistics, in float64."""
    assert set(gaps[case]) == {"losses", "gradients", "state"}
    assert max(gaps[case].values()) < 1e-9


def test_gathered_statistics_are_needed(gaps):
    """The comparison is not empty."""
    assert gaps["without gathered statistics"]["gradients"] > 1e-3


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree") / "regdb"
    return write_tree("regdb", folder, n_train=4, n_test=4, n_images=2, size=(48, 24))


def test_a_run_goes_on_with_two_processes_and_ends_as_with_one(tree, tmp_path):
    """One epoch by one process, two more by two; the whole run by one."""
    given = QUICK | {"dataset": "regdb", "root": str(tree)}
    whole, begun = (make_plan(DEFAULTS | given | {"out": str(tmp_path / n)}) for n in "ab")
    carry_out(whole)
    run = start(begun, open_data(begun))
    run._one_epoch(0, None)
    words = [w for k, v in (given | {"out": begun.folder}).items() for w in ("-p", k, v)]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", 2]
    said = finished(*torchrun, "-m", "afen.runs", *words)
    assert said.count("Going on from epoch 1") == 1  # only the first process speaks
    one, two = (read_record(plan.folder / "record.json") for plan in (whole, begun))
    assert one["id"] == two["id"] and one["scores"].keys() == two["scores"].keys()
    assert (one["machine"]["processes"], two["machine"]["processes"]) == (1, 2)
    assert "processes was 1 and is 2 since" in two["reason"]
    losses = [pd.read_csv(plan.folder / "metrics.csv").loss for plan in (whole, begun)]
    assert (losses[0] - losses[1]).abs().max() < 1e-4
    states = [load_file(plan.folder / "weights.safetensors") for plan in (whole, begun)]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_shares_are_whole_identities_and_come_back_in_order(n):
    """Two blocks of four identities with three images of each."""
    labels = torch.arange(4).repeat_interleave(3).repeat(2)
    rows = torch.arange(len(labels))
    shares = [share_of(rows, 12, n, r) for r in range(n)]
    for share in shares:
        assert len(labels[share].unique()) == 4 // n and len(share) == 24 // n
    assert torch.equal(in_order(torch.cat(shares), 12, n), rows)


@pytest.mark.parametrize(
    "given, sentence",
    [
        ((3, 8, None, False), "use --nproc-per-node 2, or -p identities 9"),
        ((5, 4, None, False), "use --nproc-per-node 4, or -p identities 5"),
        ((2, 8, 32, False), "-p chunk is for one process"),
        ((2, 8, None, True), "-p compile is for one process"),
    ],
)
def test_what_processes_cannot_share_is_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_processes(*given)
    check_processes(1, *given[1:])


def test_a_wrong_word_ends_with_its_sentence():
    with pytest.raises(SystemExit, match="ValueError: .*did you mean 'regdb'"):
        main(["-p", "dataset", "regbd"])
