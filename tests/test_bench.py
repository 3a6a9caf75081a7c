"""What a benchmark compares does the same work, and a run leaves a record."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import bench  # noqa: E402


@pytest.mark.parametrize("protocol", ["regdb", "sysu"])
def test_all_rankings_give_the_same_scores(protocol):
    runs = bench.ranking(60, 220, protocol, trials=1, part=1)
    loop, oracle, ours = (runs[n]() for n in ("released algorithm", "oracle", "ours"))
    for other in (loop, oracle):
        np.testing.assert_allclose(other.cmc, ours.cmc, atol=1e-12)
        assert abs(other.mAP - ours.mAP) < 1e-12 and abs(other.mINP - ours.mINP) < 1e-12
        assert other.n_queries == ours.n_queries


def test_the_loops_see_as_many_queries_as_their_part_says():
    case = bench.ranking_case(60, 220, "regdb", trials=5, part=50)
    runs = case.make()
    seen = runs["released algorithm"]().n_queries
    assert case.parts["oracle"] * seen == 5 * 60 and runs["ours"]().n_queries == 60


def test_both_make_as_many_views():
    runs = bench.views()
    theirs, ours = (runs[name]() for name in ("PIL, image by image", "ours"))
    shapes = [[half.shape for half in halves] for halves in (theirs, ours)]
    assert shapes == [[(64, 3, 288, 144), (32, 3, 288, 144)]] * 2
    assert runs["floor"]().shape == (96, 3, 288, 144)


def test_all_medians_are_the_lower_one():
    first, *others = (run() for run in bench.medians().values())
    assert len(others) == 4 and all(torch.equal(first, other) for other in others)


def test_the_optimisers_take_the_same_step(monkeypatch):
    network = nn.Linear(5, 3)
    monkeypatch.setattr(bench, "paper_method", lambda name: network)
    weights = []
    for step in bench.optimisers().values():
        step()
        (group,) = step.__self__.param_groups
        weights.append(torch.cat([p.detach().flatten() for p in group["params"]]))
    start = torch.cat([p.detach().flatten() for p in network.parameters()])
    assert len(weights) == 3 and not torch.equal(weights[0], start)
    assert all(torch.allclose(weights[0], other, atol=1e-7) for other in weights)


def test_a_step_learns_and_the_plain_network_has_the_stride_of_ours():
    method = bench.paper_method("caj", depth=18, height=32, width=16, n_identities=6)
    before = method.head.classifier.weight.detach().clone()
    losses = bench.step_of(method, people=2)()
    assert losses["loss"].isfinite()
    assert not torch.equal(before, method.head.classifier.weight)
    network = bench.plain_resnet()
    strides = {m.stride for m in network.layer4.modules() if isinstance(m, nn.Conv2d)}
    assert strides == {(1, 1)}


def test_both_embeddings_are_of_one_size(monkeypatch):
    features = {name: run().shape for name, run in bench.embeddings().items()}
    assert features["torchvision"] == features["ours"] == (16, 2048)


@pytest.mark.parametrize("block", [3, 7, 100])
def test_the_exact_search_is_exact(monkeypatch, block):
    monkeypatch.setattr(bench, "BLOCK", block)
    query, gallery = bench.crowd(50, 6)
    whole = (query @ gallery.T).argsort(dim=1, descending=True)
    for k in (1, 5, 50):
        assert torch.equal(bench.exact_search(query, gallery, k), whole[:, :k])


def test_visiting_all_cells_finds_everybody():
    pytest.importorskip("faiss")
    import faiss

    query, gallery = bench.crowd(400, 10)
    found = bench.flat_index(query, gallery)()[1]
    assert np.array_equal(found, bench.exact_search(query, gallery, bench.IMAGES).numpy())
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(bench.WIDTH), bench.WIDTH, 4)
    bench.build(index, gallery)
    assert index.ntotal == 400


def test_without_faiss_the_curve_says_so(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "GALLERIES", (20, 40))
    rows = list(bench.growth_of_search())
    assert [row.get("x") for row in rows] == [20, 40, None]
    assert rows[-1]["why"].startswith("not run: faiss is not installed")


def test_the_memory_of_a_block_is_seen():
    with bench.peak_memory() as most:
        kept = np.ones(10**7)
        for _ in range(20):  # long enough to be looked at
            kept += 1
    assert 60 < most[0] < 400


def test_the_turns_are_fair_and_the_record_holds_them(monkeypatch, tmp_path, capsys):
    turns = []
    runs = {"first": lambda: turns.append("a"), "second": lambda: turns.append("b")}
    monkeypatch.setattr(bench, "CASES", {"nothing": bench.Case(lambda: runs, {"first": 4})})
    monkeypatch.setattr(bench, "GROWTH", {})
    monkeypatch.setattr(bench, "project_root", lambda: tmp_path)
    bench.main([])
    assert turns == ["a", "b"] * 4, "one turn warms up, three count"
    (path,) = (tmp_path / "runs" / "bench").glob("*.json")
    record = json.loads(path.read_text())
    first, second = record["rows"]
    assert (first["case"], first["part"], second["part"]) == ("nothing", 4, 1)
    assert len(second["each"]) == 3 and second["load"] >= 0
    for name in ("processor", "cores", "threads", "instructions", "load"):
        assert name in record["machine"]
    assert record["code"]["revision"] and record["packages"]["torch"] and record["command"]


def test_a_command_is_timed_with_all_that_it_starts(monkeypatch):
    words = [sys.executable, "-c", "sum(range(10**7))"]
    (row,) = bench.command(words)
    assert row["returned"] == 0 and 0 < row["processor_seconds"] <= 2 * row["seconds"]


def test_an_unknown_case_is_refused():
    with pytest.raises(SystemExit, match="Unknown case 'nothing'.*known: ten single-shot"):
        bench.main(["nothing"])
