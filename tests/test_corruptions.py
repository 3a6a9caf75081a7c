"""ImageNet-C's corruptions: named, seeded, and refused in one sentence."""

import sys

import numpy as np
import pytest

from afen import corruptions
from afen.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corrupt_as_drawn
from afen.tables import SETTING_TITLES, published

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 64, 32, 3), dtype=np.uint8)
needs_package = pytest.mark.skipif(
    not corruptions.is_installed(), reason="imagecorruptions-imaug is not installed"
)


@needs_package
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_an_image_is_corrupted_the_same_wherever_it_stands(kind):
    np.random.seed(1)
    expected = np.random.rand()
    np.random.seed(1)
    all_at_once = corrupt(IMAGES, kind, 5)
    assert np.random.rand() == expected  # the caller's draws go on as if nothing had been
    assert all_at_once.shape == IMAGES.shape and all_at_once.dtype == np.uint8
    assert not np.array_equal(all_at_once, IMAGES)
    for place in range(len(IMAGES)):
        alone = corrupt(IMAGES[[place]], kind, 5, names=[place])
        assert np.array_equal(alone[0], all_at_once[place])


DRAWN = [k for k in CORRUPTIONS if k.endswith("noise") or k in (
    "glass_blur", "motion_blur", "snow", "frost", "fog", "elastic_transform",
)]  # fmt: skip


@needs_package
@pytest.mark.parametrize("kind", DRAWN)
def test_seed_and_name_decide_what_is_drawn(kind):
    same = np.repeat(IMAGES[:1], 3, axis=0)
    by_name = corrupt(same, kind, 5)
    assert not np.array_equal(by_name[0], by_name[1])
    assert not np.array_equal(corrupt(same, kind, 5, seed=1), by_name)
    named = corrupt(same, kind, 5, names=["a", "b", "a"])
    assert np.array_equal(named[0], named[2]) and not np.array_equal(named[0], named[1])


@needs_package
def test_the_fifteen_are_the_common_ones_of_the_package():
    package = corruptions.corruptions_package()
    assert list(CORRUPTIONS) == package.get_corruption_names("common")
    for group, names in corruptions.GROUPS.items():
        assert list(names) == package.get_corruption_names(group)


@needs_package
def test_every_kind_and_severity_is_drawn_and_a_repetition_draws_anew():
    many = np.repeat(IMAGES[:1], 400, axis=0)
    mixed, drawn = corrupt_as_drawn(many[:40])
    kinds, severities = zip(*drawn)
    assert set(severities) == set(SEVERITIES) and len(set(kinds)) > 10
    assert drawn == corrupt_as_drawn(many[:40])[1] != corrupt_as_drawn(many[:40], seed=1)[1]
    place = 7
    alone, same = corrupt_as_drawn(many[:1], names=[place])
    assert same == [drawn[place]] and np.array_equal(alone[0], mixed[place])


def test_without_the_package_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ImportError, match="^Corruptions are made by .*corruptions.'\\.$"):
        corrupt(IMAGES, "fog", 1)


WRONG = [
    (IMAGES, "fogg", 1, None, "did you mean 'fog'"),
    (IMAGES, "fog", 0, None, "from 1 to 5"),
    (IMAGES, "fog", 2.5, None, "from 1 to 5"),
    (IMAGES[:, :31], "fog", 1, None, "at least 32x32"),
    (IMAGES[0], "fog", 1, None, "at least 32x32"),
    (IMAGES[..., :1], "fog", 1, None, "at least 32x32"),
    (IMAGES / 255, "fog", 1, None, "Images are float64"),
    (IMAGES, "fog", 1, ["a"], "3 images and 1 names"),
]


@pytest.mark.parametrize("images, kind, severity, names, sentence", WRONG)
def test_what_cannot_be_corrupted_is_refused(images, kind, severity, names, sentence):
    with pytest.raises(ValueError, match=sentence):
        corrupt(images, kind, severity, names=names)


def test_cil_is_whole():
    """Two networks, four settings, three metrics; corruption costs each of them."""
    table = published("corrupted")
    keys = ["method", "setting", "metric"]
    assert len(table) == 24 and not table[keys].duplicated().any()
    assert set(table["setting"]) <= set(SETTING_TITLES)
    clean = table.set_index(keys)["clean"].astype(float)
    assert (table.set_index(keys)["value"] < clean).all()
    again = published("remeasured").set_index(keys)["value"]
    for key in [("agw", "visible-to-infrared", "mAP"), ("agw", "infrared-to-visible", "rank1")]:
        assert clean[key] == again[key]  # one and the same training
