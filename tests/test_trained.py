"""A finished run opened again: what it gives, and what is refused."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from afen import trained
from afen.backbone import load_resnet
from afen.datasets import list_folder
from afen.evaluation import average, evaluate_trials
from afen.method import POCKET_RECIPE, create, method_class, method_names
from afen.people import write_tree
from afen.records import fingerprint, read_record
from afen.runs import DEFAULTS, carry_out, make_plan

SIZE = {"n_train": 4, "n_test": 3, "n_images": 2, "size": (48, 24)}


@pytest.fixture(scope="module")
def start_weights(tmp_path_factory):
    """A file of start weights, to be moved away after training."""
    path = tmp_path_factory.mktemp("start") / "start.pth"
    torch.save(load_resnet(POCKET_RECIPE.depth, "none").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, start_weights):
    """The folder of a finished tiny run; its images lie beside it, in `tree`."""
    here = tmp_path_factory.mktemp("trained")
    root = write_tree("regdb", here / "tree", **SIZE)
    plan = make_plan(
        DEFAULTS
        | {"dataset": "regdb", "preset": "pocket", "root": str(root), "method": "agw"}
        | {"out": str(here / "run"), "device": "cpu"}
        | {"epochs": 1, "steps": 1, "identities": 2, "images": 2}
        | {"weights": str(start_weights)}
    )
    carry_out(plan)
    return here / "run"


@pytest.fixture
def run(folder):
    return trained.open_run(folder, "cpu")


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder, to be spoilt."""
    return shutil.copytree(folder, tmp_path / "copy")


def test_the_recorded_scores_come_again(run, folder):
    data = trained.run_data(run, str(folder.parent / "tree"))
    features = run.embed(data.test, data.split.test.modality)
    for setting, scores in evaluate_trials(features, data.split).items():
        recorded = run.record["scores"][setting]["mean"]
        assert average(scores).mAP == pytest.approx(recorded["mAP"], abs=1e-5)


def test_a_run_opens_without_its_data_and_its_start_weights(
    folder, start_weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(trained, "open_data", None)  # no data set may be looked for
    away = start_weights.rename(tmp_path / "moved.pth")
    try:
        run = trained.open_run(folder)
        mine = write_tree("folder", tmp_path / "mine", n_train=2, n_test=2, n_images=2)
        crops = list_folder(mine)
        features = run.embed(run.pack(mine, crops.path, tmp_path), crops.modality)
        assert features.shape == (len(crops), 128) and not run.network.training
        with pytest.raises(FileNotFoundError, match="Weights file .*start.pth"):
            trained.initial_network(run, start_weights)
        with pytest.raises(ValueError, match="is not the one that the run started from"):
            trained.initial_network(run, folder / "record.json")
    finally:
        away.rename(start_weights)


def test_the_initial_network_started_from_the_start_weights(run, start_weights):
    initial = trained.initial_network(run, start_weights).state_dict()
    first = torch.load(start_weights, weights_only=True)
    name = "trunk.layer1.0.conv1.weight"
    torch.testing.assert_close(initial[f"net.{name}"], first[name.removeprefix("trunk.")])
    assert not initial["head.classifier.weight"].equal(
        run.network.state_dict()["head.classifier.weight"]
    )


def spoil(folder, weights, run=None):
    """Write other weights; under the run's own name if none is given."""
    record = json.loads((folder / "record.json").read_text())
    save_file(weights, folder / "weights.safetensors", {"run": run or record["id"]})


def without(weights, name):
    return {k: v for k, v in weights.items() if k != name}


WRONG = {
    "missing": (lambda w, n: without(w, n), "{n} is missing"),
    "extra": (lambda w, n: w | {"more": w[n].clone()}, "more is no part of the network"),
    "misshapen": (lambda w, n: w | {n: w[n][:1].clone()}, "{n} has shape .* instead of"),
    "nan": (lambda w, n: w | {n: w[n] * torch.nan}, "NaN or infinity in {n}"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_weights_are_refused_by_the_first_difference(copy, kind):
    weights = load_file(copy / "weights.safetensors")
    name = "head.classifier.weight"
    change, said = WRONG[kind]
    spoil(copy, change(weights, name))
    with pytest.raises(ValueError, match=said.format(n=name)):
        trained.open_run(copy)


def test_weights_of_another_run_are_refused(copy):
    spoil(copy, load_file(copy / "weights.safetensors"), "another")
    with pytest.raises(ValueError, match="belong to run another.*do not move files"):
        trained.open_run(copy)


def test_weights_name_the_images_they_were_learned_from(copy):
    """A run's name does not: `-p dataset folder` has one name for all photographs."""
    path = copy / "weights.safetensors"
    record = read_record(copy / "record.json")
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["images"] == record["data"]["hash"]
    save_file(load_file(path), path, {"run": record["id"], "images": "2-others"})
    with pytest.raises(ValueError, match="learned from other images.*do not move files"):
        trained.open_run(copy)


def test_the_hash_of_weights_is_that_of_the_numbers(run, copy):
    """Neither the file's notes count nor the device or precision that it is used in."""
    weights = load_file(copy / "weights.safetensors")
    spoil(copy, weights)  # as an older file, which names no images
    again = trained.open_run(copy, "cpu")
    again.network.half()
    assert again.weights == run.weights
    spoil(copy, weights | {"head.neck.bias": weights["head.neck.bias"] + 1})
    assert trained.open_run(copy, "cpu").weights != run.weights


def test_missing_and_damaged_weights_are_refused(copy):
    weights = copy / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="are damaged"):
        trained.open_run(copy)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="There are no weights"):
        trained.open_run(copy)


def test_a_failed_run_is_refused(copy):
    record = json.loads((copy / "record.json").read_text()) | {"status": "failed"}
    record |= {"fingerprint": fingerprint(record)}
    (copy / "record.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="did not finish"):
        trained.open_run(copy)


def test_other_images_are_refused(run, tmp_path):
    other = write_tree("regdb", tmp_path / "tree", **SIZE, seed=5)
    with pytest.raises(ValueError, match="not those that run"):
        trained.run_data(run, str(other))


WORDS = {
    "spelling": ("Visible", "Infrared"),
    "another": ("visible", "thermal"),
    "None": ("visible", None),
    "nan": (np.nan, "infrared"),
}


@pytest.fixture
def images(run, folder):
    return trained.run_data(run, str(folder.parent / "tree")).test


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_a_word_that_is_no_modality_is_refused(run, images, words):
    modality = pd.Series(np.resize(np.array(words, object), len(images)))
    with pytest.raises(ValueError, match="is not visible or infrared"):
        run.embed(images, modality)


@pytest.mark.parametrize("n", [0, 3])
def test_a_table_of_another_length_is_refused(run, images, n):
    with pytest.raises(ValueError, match=f"{len(images)} images and {n} modalities"):
        run.embed(images, pd.Series(["visible"] * n))


@pytest.mark.parametrize("name", method_names())
def test_every_method_refuses_other_words_and_is_called_like_a_network(name):
    network = create(name, 4, method_class(name).recipes["pocket"]).eval()
    images = torch.zeros(2, 3, 64, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match='"thermal" is not visible or infrared'):
        network.embed(images, "thermal")
    with torch.no_grad():
        called = network(images, "infrared")
        torch.testing.assert_close(called, network.embed(images, "infrared"))
