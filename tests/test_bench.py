"""The two sides of a benchmark do the same work, and a run leaves a record."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import bench  # noqa: E402


@pytest.mark.parametrize("protocol", ["regdb", "sysu"])
def test_both_rankings_give_the_same_scores(protocol):
    loop, fast = (rank() for rank in bench.ranking(60, 220, protocol, part=1))
    np.testing.assert_allclose(loop.cmc, fast.cmc, atol=1e-12)
    assert abs(loop.mAP - fast.mAP) < 1e-12 and loop.n_queries == fast.n_queries


def test_both_make_as_many_views():
    theirs, ours = (make() for make in bench.views())
    assert len(theirs) == sum(map(len, ours)) == 96
    assert {x.shape[1:] for x in (theirs, *ours)} == {(3, 288, 144)}


def test_the_turns_are_fair_and_the_record_holds_them(monkeypatch, tmp_path):
    turns = []
    pair = (lambda: turns.append("a"), lambda: turns.append("b"))
    monkeypatch.setattr(bench, "CASES", {"nothing": (lambda: pair, 1)})
    monkeypatch.setattr(bench, "project_root", lambda: tmp_path)
    bench.main([])
    assert turns == ["a", "b"] * 4, "one round warms up, three count"
    (path,) = (tmp_path / "runs" / "bench").glob("*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["case"] == "nothing" and len(row["ours_each"]) == 3
