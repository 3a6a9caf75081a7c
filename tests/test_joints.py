"""Joints: of the data set, kept from before, or found; and what is said if they are not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import afen.joints
from afen.batches import joints_of, pack
from afen.datasets import JOINT_COLUMNS, load
from afen.joints import (
    detect,
    find_joints,
    kept_joints,
    load_detector,
    surest_joints,
    with_joints,
)
from afen.people import write_tree
from afen.runs import DEFAULTS, make_plan, open_data


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A small rendered RegDB."""
    folder = tmp_path_factory.mktemp("joints") / "tree"
    return write_tree("regdb", folder, n_train=6, n_test=2, n_images=2, size=(48, 24))


@pytest.fixture
def rendered(tree, tmp_path):
    """Its split, and its training images packed at another size."""
    split = load("regdb", tree)
    return split, pack(split.root, split.train.path, (64, 48), tmp_path)


@pytest.fixture
def bare(rendered):
    """The same as photographs are: without joints."""
    split, packed = rendered
    return replace(split, train=split.train.drop(columns=JOINT_COLUMNS)), packed


def refuse(images):
    raise AssertionError("the detector was called")


def constant(images):
    """A detector that sees all joints of everybody in one place."""
    return torch.tensor([24.0, 32.0, 1.0]).repeat(len(images), 17, 1)


def test_the_surest_person_is_kept_and_its_unsure_joints_are_hidden():
    people = {
        "scores": torch.tensor([0.4, 0.8, 0.6]),
        "keypoints": torch.rand(3, 17, 3),
        "keypoints_scores": torch.full((3, 17), 5.0),
    }
    people["keypoints_scores"][1, ::2] = 1.0
    joints = surest_joints(people)
    assert torch.equal(joints[:, :2], people["keypoints"][1, :, :2])
    assert joints[:, 2].tolist() == [0, 1] * 8 + [0]
    nobody = surest_joints({name: value[:0] for name, value in people.items()})
    assert nobody.shape == (17, 3) and not nobody.any()


def test_a_random_network_gives_joints_of_every_image(monkeypatch):
    monkeypatch.setitem(afen.joints.ENLARGED, "min_size", 64)
    detector = load_detector(Path("joints.csv"), weights=None)
    images = torch.randint(0, 256, (3, 3, 32, 16), dtype=torch.uint8)
    joints = detector(images)
    assert joints.shape == (3, 17, 3) and joints.isfinite().all()
    pixel = 16 / 64  # one of the enlarged image's: torchvision takes no smaller box
    assert (joints[:, :, 0] <= 16 + pixel).all() and (joints[:, :, 1] <= 32 + pixel).all()


def test_the_model_sees_fractions_one_image_at_a_time():
    class Model(torch.nn.Linear):
        def forward(self, images):
            assert not torch.is_grad_enabled()
            assert [i.shape for i in images] == [(3, 4, 2)] * 2 and images[0].max() == 1
            return [{"scores": torch.zeros(0)}] * 2

    images = torch.full((2, 3, 4, 2), 255, dtype=torch.uint8)
    assert not detect(Model(1, 1), images).any()


def test_found_joints_are_in_pixels_of_the_files(rendered, capsys):
    split, packed = rendered
    truth, calls = joints_of(packed, split.train, np.arange(len(packed))), []

    def stub(images):
        rows = [
            int(np.flatnonzero((packed.images == image).all((1, 2, 3)))[0])
            for image in images.permute(0, 2, 3, 1).numpy()
        ]
        calls.extend(rows)
        return truth[rows].clone()

    table = find_joints(packed, split.train.path, stub)
    assert np.allclose(table, split.train[JOINT_COLUMNS], atol=1e-3)
    assert table.index.tolist() == split.train.path.tolist()
    assert set(calls) == set(range(len(packed)))
    assert f"Joints of {len(packed)} images" in capsys.readouterr().out


def test_a_set_with_joints_never_meets_the_detector(rendered):
    split, packed = rendered
    assert with_joints(split, packed, detector=refuse).train.equals(split.train)
    assert not packed.path.with_suffix("").exists()


def test_joints_are_found_once_and_kept_beside_the_pack(bare):
    split, packed = bare
    first = with_joints(split, packed, detector=constant).train
    assert kept_joints(packed).is_file()
    second = with_joints(split, packed, detector=refuse).train
    assert first.equals(second)
    assert (first[["x0", "y0", "v0"]] == [12, 24, 1]).all(axis=None)
    moved = joints_of(packed, first, np.arange(4))
    assert torch.allclose(moved, constant(moved), atol=0.05)


@pytest.mark.parametrize("setting", ["VISIBLE", "WEIGHTS", "min_size", "max_size"])
def test_joints_found_in_another_way_are_found_anew(bare, monkeypatch, capsys, setting):
    split, packed = bare
    first = with_joints(split, packed, detector=constant).train
    capsys.readouterr()
    if setting in afen.joints.ENLARGED:
        monkeypatch.setitem(afen.joints.ENLARGED, setting, 999)
    else:
        monkeypatch.setattr(afen.joints, setting, 9)
    second = with_joints(split, packed, detector=lambda x: constant(x) + 1).train
    assert "found once" in capsys.readouterr().out and not first.equals(second)
    monkeypatch.undo()
    assert with_joints(split, packed, detector=refuse).train.equals(first)


def test_images_without_joints_are_counted_by_modality(bare, capsys):
    split, packed = bare
    kept = kept_joints(packed)
    with_joints(split, packed, detector=constant)
    table = pd.read_csv(kept)
    table[(split.train.modality == "visible").to_numpy()].to_csv(kept, index=False)
    train = with_joints(split, packed, detector=refuse).train
    assert "visible 100%, infrared 0%" in capsys.readouterr().out
    unseen = train[train.modality == "infrared"][JOINT_COLUMNS]
    assert (unseen == 0).all(axis=None)


def test_nobody_seen_and_a_table_of_other_images_are_refused(bare):
    split, packed = bare
    with pytest.raises(ValueError, match="No joint is visible"):
        with_joints(split, packed, detector=lambda images: 0 * constant(images))
    kept = kept_joints(packed)
    pd.read_csv(kept).drop(columns="v16").to_csv(kept, index=False)
    with pytest.raises(ValueError, match="no column v16"):
        with_joints(split, packed, detector=refuse)


@pytest.fixture
def offline(monkeypatch):
    """Torchvision cannot download."""

    def fail(**given):
        assert given["weights"] == "COCO_V1" and given["weights_backbone"] is None
        raise OSError("no connection")

    monkeypatch.setattr(afen.joints, "keypointrcnn_resnet50_fpn", fail)


def test_without_weights_the_sentence_says_what_to_do(bare, offline):
    split, packed = bare
    with pytest.raises(FileNotFoundError) as caught:
        with_joints(split, packed)
    kept = kept_joints(packed)
    for word in ("no connection", "connect once", str(kept), "-p dataset pocket-regdb"):
        assert word in str(caught.value)
    assert not kept.exists()


def test_opening_data_asks_for_joints_only_where_a_method_needs_them(tree, tmp_path, offline):
    given = {"dataset": "regdb", "root": str(tree), "preset": "pocket"}
    spot = make_plan(DEFAULTS | given | {"method": "spot"})
    assert open_data(spot).rendered  # its own joints: no detector
    kept = ("joints.csv", "rendered.json")
    for name in kept:
        (tree / name).rename(tmp_path / name)
    try:
        assert not open_data(make_plan(DEFAULTS | given | {"method": "agw"})).rendered
        with pytest.raises(FileNotFoundError, match="Keypoint R-CNN"):
            open_data(spot)
    finally:
        for name in kept:
            (tmp_path / name).rename(tree / name)
