"""Probes: each measurement against a slow one, and what a probe refuses."""

import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from afen import grid, people, probes
from afen.batches import PackedImages, pack
from afen.core import torch_generator
from afen.corruptions import is_installed
from afen.datasets import Split, check_split, load
from afen.losses import pairwise_distances
from afen.method import POCKET_RECIPE, create, method_class, method_names
from afen.methods.agw import AGW
from afen.people import write_tree
from afen.records import load_records
from afen.runs import DEFAULTS, carry_out, make_plan

ROOT = Path(__file__).resolve().parent.parent
needs_package = pytest.mark.skipif(
    not is_installed(), reason="imagecorruptions-imaug is not installed"
)


def test_every_kept_run_with_a_module_or_its_base_has_a_probe():
    studies = ("choice", "ablation", "start")
    asked = {j.id for j in grid.jobs("pocket", studies) if j.parameters["method"] == "afen"}
    probed = {probe["run"] for probe in probes.load_probes()}
    kept = {record["id"] for record in load_records()} & asked
    assert kept - probed == set()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run of AFEN: its folder, and the folder of its images."""
    folder = tmp_path_factory.mktemp("probes")
    size = {"n_train": 4, "n_test": 3, "n_images": 2, "size": (48, 24)}
    root = write_tree("regdb", folder / "tree", **size)
    plan = make_plan(
        DEFAULTS
        | {"dataset": "regdb", "preset": "pocket", "root": str(root)}
        | {"out": str(folder / "run"), "device": "cpu"}
        | {"epochs": 1, "steps": 1, "identities": 2, "images": 2}
    )
    carry_out(plan)
    return folder / "run", str(root)


@pytest.fixture(scope="module")
def subject(run):
    return probes.open_subject(*run, "cpu")


def random(*shape, key=0):
    return torch.randn(*shape, generator=torch_generator("test probes", key))


def test_a_pocket_run_is_probed_on_its_first_sets():
    """As many trials as sets, on the same images in the same order, under new row numbers."""
    split = load("pocket-regdb")
    whole = pack(split.root, split.test.path, (POCKET_RECIPE.height, POCKET_RECIPE.width))
    first = probes.first_sets(SimpleData(split, whole))
    n = probes.PROBED * people.TEST_SET
    assert first.split.test.identity.nunique() == n < split.test.identity.nunique()
    assert len(first.split.trials) == 2 * probes.PROBED
    assert len(first.test.images) == len(first.split.test)
    by_name = {(t.setting, t.number): t for t in split.trials}
    for trial in first.split.trials:
        same = by_name[trial.setting, trial.number]
        for kind in ("query", "gallery"):
            paths = first.split.test.path[getattr(trial, kind)].tolist()
            assert paths == split.test.path[getattr(same, kind)].tolist()
    row = first.split.trials[-1].gallery[3]
    assert check_split(first.split) is first.split
    there = np.flatnonzero(split.test.path == first.split.test.path[row])
    assert first.test.batch(np.array([row])).equal(whole.batch(there))


@dataclass(frozen=True)
class SimpleData:
    """What `first_sets` asks of a run's data."""

    split: Split
    test: PackedImages


@needs_package
def test_an_image_is_corrupted_by_its_name_alone(subject):
    test, split = subject.data.test, subject.data.split.test
    rows = np.flatnonzero(split.modality == "visible")
    names = split.path.iloc[rows].tolist()
    together = probes.corrupted_images(test, rows, names, 5)
    alone = probes.corrupted_images(test, rows[2:3], names[2:3], 5)
    assert np.array_equal(together.images[2], alone.images[0])
    assert not np.array_equal(together.images, test.images[rows])
    found = probes.corrupted_images(test, rows, names, 5)
    assert found.path == together.path and found.path != test.path


@needs_package
def test_infrared_images_and_clean_scores_stay(subject):
    tables = probes.corruption(subject)
    clean = probes.mean_scores(subject.embed(), subject.data.split)
    rows = [row for row in tables["corruption"] if row["severity"] == 0]
    assert {row["setting"]: row["mAP"] for row in rows} == {k: s.mAP for k, s in clean.items()}
    assert {row["severity"] for row in tables["drift"]} == {1, 2, 3, 4, 5}
    assert all(row["drift"] > 0 for row in tables["drift"])


def test_without_the_package_corruptions_are_not_measured(subject, monkeypatch):
    monkeypatch.setattr(probes, "is_installed", lambda: False)
    assert probes.corruption(subject) == {"corruption": [], "drift": []}


@pytest.mark.parametrize("name", people.POCKET_SETS)
def test_a_transfer_meets_no_person_of_a_pocket_set(name):
    """The pocket sets themselves share people; the strangers share none with them."""
    strangers = probes.STRANGERS[name]
    drawn = {
        people.sample_person(spec.seed, identity, spec.difficulty)
        for spec in people.POCKET_SETS.values()
        for identity in spec.identities
    }
    met = {people.sample_person(strangers.seed, i, strangers.difficulty)
           for i in strangers.identities}  # fmt: skip
    assert len(met) == len(strangers.identities) and not met & drawn


def test_a_gate_that_answers_the_same_does_not_drift_and_does_not_spread():
    attention = probes.ChannelAttention(4)
    nn.init.zeros_(attention.mlp[2].weight)
    gates = probes.branch_gates(attention, random(3, 4, 5, 5))
    other = probes.branch_gates(attention, random(3, 4, 5, 5, key=1))
    (row, *_) = probes.drift(
        {"a": attention}, {"a": other}, {"a": gates}, {"blur": np.arange(3)}, {}
    )
    assert row["drift"] == 0 and row["spread"] < 1e-6


@pytest.mark.parametrize("size", [None, 36, 8, 3])
def test_extent_against_a_loop(size):
    weights = random(7).tolist()
    mass = [abs(w) * (max(0, size - abs(o)) if size else 1)
            for o, w in enumerate(weights, -3)]  # fmt: skip
    middle = sum(m * o for o, m in enumerate(mass, -3)) / sum(mass)
    spread = sum(m * (o - middle) ** 2 for o, m in enumerate(mass, -3)) / sum(mass)
    assert probes.extent(torch.tensor(weights), size) == pytest.approx(math.sqrt(spread))


@pytest.mark.parametrize("shape", [(2, 3, 4, 2), (1, 2, 9, 5), (1, 1, 16, 16)])
def test_the_bands_add_up_to_the_mean_square(shape):
    x = random(*shape)
    torch.testing.assert_close(probes.spectrum(x).sum(1), x.square().mean((1, 2, 3)))


@pytest.mark.parametrize("across", [False, True])
def test_a_wave_of_two_positions_is_the_nyquist_frequency(across):
    wave = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8)
    power = probes.spectrum(wave.mT if across else wave)[0]
    torch.testing.assert_close(power, torch.tensor([0, 0, 0, 0, 1.0, 0]))
    assert probes.high_share(power) == 1


def test_mmd_against_a_loop():
    a, b = random(6, 3), random(5, 3, key=1) + 0.5
    both = torch.cat([a, b]).tolist()
    lengths = sorted(math.dist(x, y) for i, x in enumerate(both) for y in both[:i])
    width = lengths[(len(lengths) - 1) // 2]

    def mean(xs, ys):
        values = [math.exp(-math.dist(x, y) ** 2 / (2 * width**2)) for x in xs for y in ys]
        return sum(values) / len(values)

    a, b = a.tolist(), b.tolist()
    expected = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    assert probes.mmd(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("squared", [False, True])
def test_the_gradient_of_a_pair_is_what_a_small_step_says(squared):
    distances = pairwise_distances(random(8, 3).double())
    labels = torch.arange(8) // 2
    same = labels[:, None] == labels

    def loss(d):
        gap = (probes.pair_weights(d, same) * d * (2.0 * same - 1)).sum(1)
        return probes.soft_margin(gap, squared).sum()

    pairs, _ = probes.pair_gradients(distances, same, squared)
    for place in ((0, 1), (0, 5)):
        step = torch.zeros_like(distances)
        step[place] = 1e-5
        slope = (loss(distances + step) - loss(distances - step)) / 2e-5
        assert pairs[place].item() == pytest.approx(abs(slope.item()), rel=1e-5)


def test_what_fem_sees_is_in_the_order_of_the_identities(subject):
    (modules,) = subject.notes((probes.FEM, probes.pooled_ends))
    (notes,) = modules.values()
    pooled = torch.cat([x for x, _ in notes])
    modality = subject.data.split.test.modality.to_numpy()
    row = np.flatnonzero(modality == "infrared")[1]
    with probes.watch(probes.parts(subject.trained, probes.FEM), probes.pooled_ends) as one:
        with torch.no_grad():
            subject.trained.embed(subject.data.test.batch(np.array([row])), "infrared")
    ((alone, _),) = next(iter(one.values()))
    place = (modality == "visible").sum() + 1
    torch.testing.assert_close(pooled[place], alone[0], rtol=1e-4, atol=1e-5)


def test_a_network_without_mecs_and_fem_has_empty_tables(subject):
    plain = create("agw", 4, POCKET_RECIPE).eval()
    bare = probes.Subject(replace(subject.run, network=plain), subject.data)
    assert probes.joins(bare) == {"joins": [], "medians": []}
    assert probes.strips(bare) == {"strips": [], "kernels": []}
    assert probes.frequencies(bare) == {"spectra": [], "response": []}
    assert [row["where"] for row in probes.gap(bare)["gap"]] == ["feature"]


def test_modules_in_the_stems_are_measured_where_they_are(subject):
    """The visible stem's see no infrared image, and the infrared stem's no corruption."""
    recipe = replace(POCKET_RECIPE, weights="none")
    network = create("afen", 4, recipe, mecs_after="stem").eval()
    stems = probes.Subject(replace(subject.run, network=network), subject.data)
    rows = {"drift": probes.corruption(stems)["drift"], "joins": probes.joins(stems)["joins"]}
    assert all("visible" in row["module"] for row in rows["drift"])
    assert bool(rows["drift"]) == is_installed()
    seen = [row["module"] for row in rows["joins"] if row["kind"] == "MECS"]
    assert [("visible" in name, "infrared" in name) for name in seen] == [(1, 0), (0, 1)]


@pytest.mark.parametrize("name", method_names())
def test_the_declared_weighted_triplet_is_what_the_losses_compute(name, subject):
    """`hardness` asks the declaration; pooled features and views must be AGW's."""
    kind = method_class(name)
    assert kind.weighted_triplet == (kind.losses is AGW.losses)
    other = create(name, 4, kind.recipes["pocket"])
    tables = probes.hardness(
        probes.Subject(replace(subject.run, network=other), subject.data)
    )
    assert bool(tables["hardness"]) == kind.weighted_triplet


def test_measuring_changes_nothing(subject):
    before = {k: v.clone() for k, v in subject.trained.state_dict().items()}
    probes.hardness(subject)
    probes.corruption(subject)
    for name, value in subject.trained.state_dict().items():
        assert value.equal(before[name]), name


def test_the_command_line_keeps_a_probe_that_repeats(run, tmp_path):
    folder, root = run
    words = [sys.executable, "-m", "afen.probes", folder, "--root", root]
    words += ["--device", "cpu"]
    done = subprocess.run(
        [*words, "--out", tmp_path], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (kept,) = probes.load_probes(tmp_path)
    again = probes.probe(folder, root, "cpu")
    assert kept["measures"] == again["measures"] and kept["status"] == "smoke"
    assert len(probes.probe_table([kept], "corruption")) == 2 * 6 * is_installed()
    path = tmp_path / f"{kept['run']}.json"
    path.write_text(path.read_text().replace('"status": "smoke"', '"status": "partial"'))
    with pytest.raises(ValueError, match="changed after it was written"):
        probes.load_probes(tmp_path)
