"""Readers and verification on trees written here: counts, draws, faults."""

import random
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.io import savemat

from afen import datasets
from afen.batches import pack
from afen.datasets import (
    IMAGE_SUFFIXES,
    JOINT_COLUMNS,
    PUBLISHED,
    SOURCES,
    list_folder,
    list_tree,
    load,
    summary,
    verify,
    without_match,
)
from afen.evaluation import evaluate
from afen.people import has_rendered_mark, write_tree

VISIBLE, INFRARED = (1, 2, 4, 5), (3, 6)
SETTINGS = ("all-single", "all-multi", "indoor-single", "indoor-multi")
DIRECTIONS = ("visible-to-infrared", "infrared-to-visible")


# Trees: no reader opens an image, so a file with its own path in it is image enough.


def write(root: Path, path: str) -> str:
    """Write a file that holds its path, and return the path."""
    file = root / path
    try:
        file.write_bytes(path.encode())
    except FileNotFoundError:
        file.parent.mkdir(parents=True)
        file.write_bytes(path.encode())
    return path


def write_lines(file: Path, lines) -> None:
    """Write an index file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def regdb_tree(root: Path, people: int = 6, images: int = 3) -> Path:
    """RegDB: half the people train, another half in each of the ten trials."""
    pools = {
        kind: {
            p: [write(root, f"{kind}/{p}/f_{p}_{i}.bmp") for i in range(images)]
            for p in range(1, people + 1)
        }
        for kind in ("Visible", "Thermal")
    }
    for trial in range(1, 11):
        order = np.random.default_rng(trial).permutation(people) + 1
        halves = {"train": order[: people // 2], "test": order[people // 2 :]}
        for part, half in halves.items():
            for kind, pool in pools.items():
                lines = [
                    f"{path} {label}"
                    for label, person in enumerate(sorted(half.tolist()))
                    for path in pool[person]
                ]
                write_lines(root / f"idx/{part}_{kind.lower()}_{trial}.txt", lines)
    return root


def sysu_tree(root: Path, ids: dict[str, list[int]], sizes: dict) -> Path:
    """SYSU-MM01 from the number of images of each (identity, camera)."""
    rng = np.random.default_rng(0)
    draws = np.empty((6, 1), object)
    for camera in range(1, 7):
        cells = np.empty((max(max(v) for v in ids.values()), 1), object)
        for identity in range(1, len(cells) + 1):
            n = sizes.get((identity, camera), 0)
            orders = [rng.permutation(n) + 1 for _ in range(10)]
            cells[identity - 1, 0] = np.asarray(orders, np.uint16)
            for image in range(1, n + 1):
                write(root, f"cam{camera}/{identity:04d}/{image:04d}.jpg")
        draws[camera - 1, 0] = cells
    for part, people in ids.items():
        write_lines(root / f"exp/{part}_id.txt", [",".join(map(str, people))])
    savemat(root / "exp/rand_perm_cam.mat", {"rand_perm_cam": draws})
    return root


SYSU_IDS = {"train": [1, 3], "val": [2], "test": [14, 5, 110]}


@pytest.fixture
def sysu(tmp_path: Path) -> Path:
    """Six people; person 5 is not in cameras 1 and 6, person 110 not in camera 2."""
    people = sum(SYSU_IDS.values(), [])
    sizes = {(p, c): 3 + (p + c) % 3 for p in people for c in range(1, 7)}
    sizes |= {(14, 4): 14, (14, 1): 13}
    for absent in ((5, 1), (5, 6), (110, 2)):
        del sizes[absent]
    return sysu_tree(tmp_path / "sysu", SYSU_IDS, sizes)


@pytest.fixture
def regdb(tmp_path: Path) -> Path:
    return regdb_tree(tmp_path / "regdb")


@pytest.fixture
def llcm(tmp_path: Path) -> Path:
    """Two training and two test people; no infrared camera 3, as in the real set."""
    root = tmp_path / "llcm"
    for short, cameras in (("vis", (1, 3, 9)), ("nir", (1, 9))):
        lines = []
        for label, person in enumerate((4, 7)):
            for c in cameras:
                name = f"{person:04d}_c{c:02d}_s1_f{label}_{short}.jpg"
                lines.append(f"{write(root, f'{short}/{person:04d}/{name}')} {label}")
        write_lines(root / f"idx/train_{short}.txt", lines)
        for person in (12, 2):
            for c in cameras:
                for image in range(1 + c % 4):
                    write(root, f"test_{short}/cam{c}/{person:04d}/{image}.jpg")
    write_lines(root / "idx/test_id.txt", ["12,2"])
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five named people; the first without camera folders."""
    root = tmp_path / "folder"
    for modality in ("visible", "infrared"):
        for name in ("ann", "bo", "cy", "di", "ed"):
            camera = "" if name == "ann" else "cam3/"
            write(root, f"{modality}/{name}/{camera}1.JPG")
    return root


# RegDB


@pytest.mark.parametrize("trial", [1, 10])
def test_regdb_counts(regdb, trial):
    split = load("regdb", regdb, split=trial)
    assert (split.name, split.protocol, split.root) == ("regdb", "regdb", regdb)
    assert split.train.modality.value_counts().to_dict() == dict(visible=9, infrared=9)
    assert not set(split.train.identity) & set(split.test.identity)
    assert sorted(split.train.label.unique()) == [0, 1, 2]
    for row in [*split.train.itertuples(), *split.test.itertuples()]:
        kind, person, _ = row.path.split("/")
        assert row.modality == {"Visible": "visible", "Thermal": "infrared"}[kind]
        assert row.identity == int(person) and (regdb / row.path).is_file()


def test_regdb_asks_both_directions_of_one_table(regdb):
    split = load("regdb", regdb, split=4)
    there, back = split.trials
    assert (there.setting, back.setting) == DIRECTIONS and there.number == 4
    assert set(split.test.modality[there.query]) == {"visible"}
    assert set(split.test.modality[there.gallery]) == {"infrared"}
    assert np.array_equal(there.query, back.gallery)
    assert np.array_equal(there.gallery, back.query)


def test_regdb_trial_selects_the_training_people_too(regdb):
    drawn = set()
    for trial in range(1, 11):
        chosen = frozenset(load("regdb", regdb, trial).train.identity)
        lines = (regdb / f"idx/train_visible_{trial}.txt").read_text().splitlines()
        assert chosen == {int(line.split("/")[1]) for line in lines}
        drawn.add(chosen)
    assert len(drawn) > 1


def test_regdb_labels_are_contiguous_whatever_the_lists_say(regdb):
    expected = load("regdb", regdb).train
    for modality in ("visible", "thermal"):
        file = regdb / f"idx/train_{modality}_1.txt"
        lines = [line.rsplit(" ", 1) for line in file.read_text().splitlines()]
        write_lines(file, [f"{path} {5 + 3 * int(label)}" for path, label in lines])
    pd.testing.assert_frame_equal(load("regdb", regdb).train, expected)


def _append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + text)


REGDB_FAULTS = {
    "missing image": (
        lambda root: next((root / "Visible/1").iterdir()).unlink(),
        FileNotFoundError, "1 of 9 images that are not under"),
    "missing index": (
        lambda root: (root / "idx/test_thermal_1.txt").unlink(),
        FileNotFoundError, "test_thermal_1.txt is missing"),
    "empty index": (
        lambda root: (root / "idx/test_visible_1.txt").write_text("\n \n"),
        ValueError, "is empty"),
    "duplicate": (
        lambda root: _append(root / "idx/train_visible_1.txt",
                             (root / "idx/train_visible_1.txt").read_text()),
        ValueError, "twice"),
    "two people": (
        lambda root: _append(root / "idx/train_visible_1.txt",
                             write(root, "Visible/77/a.bmp") + " 2\n"),
        ValueError, "label 2 has more than one identity"),
    "no label": (
        lambda root: _append(root / "idx/train_visible_1.txt", "Visible/1/a.bmp\n"),
        ValueError, "line 10: 'Visible/1/a.bmp'"),
    "no identity": (
        lambda root: _append(root / "idx/train_visible_1.txt",
                             write(root, "Visible/x/a.bmp") + " 0\n"),
        ValueError, "not an identity number"),
    "one modality": (
        lambda root: _append(root / "idx/train_visible_1.txt",
                             write(root, "Visible/77/a.bmp") + " 3\n"),
        ValueError, "no infrared training image of identity 77"),
}


@pytest.mark.parametrize("fault", REGDB_FAULTS)
def test_regdb_faults(regdb, fault):
    damage, error, sentence = REGDB_FAULTS[fault]
    damage(regdb)
    with pytest.raises(error, match=sentence):
        load("regdb", regdb)


@pytest.mark.parametrize("trial", [0, 11, -1])
def test_regdb_has_ten_trials(regdb, trial):
    with pytest.raises(ValueError, match="splits 1 to 10"):
        load("regdb", regdb, split=trial)


def test_someone_in_training_and_in_test(regdb):
    shutil.copy(regdb / "idx/train_visible_1.txt", regdb / "idx/test_visible_1.txt")
    with pytest.raises(ValueError, match="in training and in test"):
        load("regdb", regdb)


# SYSU-MM01


def naive_random(root: Path, ids, cameras, number: int) -> list[str]:
    """One image of each person and camera, with the global generator, file by file."""
    state = random.getstate()
    random.seed(number)
    chosen = []
    for person in sorted("%04d" % identity for identity in ids):
        for camera in cameras:
            place = root / f"cam{camera}" / person
            if place.is_dir():
                files = sorted(p.relative_to(root).as_posix() for p in place.iterdir())
                chosen.append(random.choice(files))
    random.setstate(state)
    return chosen


def naive_official(root: Path, ids, cameras, number: int, shots: int) -> list[str]:
    """The first columns of row `number`, read straight from the official file."""
    from scipy.io import loadmat

    draws = loadmat(root / "exp/rand_perm_cam.mat")["rand_perm_cam"]
    chosen = []
    for identity in sorted(ids):
        for camera in cameras:
            order = draws[camera - 1][0][identity - 1][0]
            if order.size:
                for image in order[number][:shots]:
                    chosen.append(f"cam{camera}/{identity:04d}/{image:04d}.jpg")
    return chosen


def test_sysu_parts(sysu):
    split = load("sysu", sysu)
    assert sorted(split.train.identity.unique()) == [1, 2, 3]
    assert sorted(split.test.identity.unique()) == [5, 14, 110]
    assert sorted(split.train.label.unique()) == [0, 1, 2]
    assert split.train.groupby("identity").label.nunique().eq(1).all()
    on_disk = sorted(p.relative_to(sysu).as_posix() for p in sysu.glob("cam*/*/*.jpg"))
    assert sorted([*split.train.path, *split.test.path]) == on_disk
    for row in split.test.itertuples():
        assert row.path.startswith(f"cam{row.camera}/{row.identity:04d}/")
        assert row.modality == ("infrared" if row.camera in INFRARED else "visible")


def test_sysu_trials(sysu):
    split = load("sysu", sysu)
    names = [(trial.setting, trial.number) for trial in split.trials]
    assert names == [(setting, number) for setting in SETTINGS for number in range(10)]
    infrared = np.flatnonzero(split.test.camera.isin(INFRARED))
    for trial in split.trials:
        assert np.array_equal(trial.query, infrared)
        cells = split.test.iloc[trial.gallery].groupby(["identity", "camera"]).size()
        cameras = VISIBLE if trial.setting.startswith("all") else (1, 2)
        assert set(cells.index.get_level_values("camera")) == set(cameras)
        assert len(np.unique(trial.gallery)) == len(trial.gallery)
        for (identity, camera), drawn in cells.items():
            n = len(list((sysu / f"cam{camera}/{identity:04d}").iterdir()))
            assert drawn == (1 if trial.setting.endswith("single") else min(10, n))


def test_random_gallery_equals_a_naive_draw(sysu):
    split = load("sysu", sysu)
    for trial in split.trials:
        if trial.setting.endswith("single"):
            cameras = VISIBLE if trial.setting.startswith("all") else (1, 2)
            naive = naive_random(sysu, SYSU_IDS["test"], cameras, trial.number)
            assert split.test.path[trial.gallery].tolist() == naive


def test_official_gallery_equals_a_naive_draw(sysu):
    split = load("sysu", sysu, gallery="official")
    for trial in split.trials:
        cameras = VISIBLE if trial.setting.startswith("all") else (1, 2)
        shots = 1 if trial.setting.endswith("single") else 10
        naive = naive_official(sysu, SYSU_IDS["test"], cameras, trial.number, shots)
        assert split.test.path[trial.gallery].tolist() == naive


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sets_of_test_people_take_the_draws_in_turn(sysu, size):
    """Three test people, ten draws of each setting; every set is asked alone."""
    split = load("sysu", sysu)
    people = [5, 14, 110]
    sets = [people[i : i + size] for i in range(0, 3, size)]
    trials = datasets.in_sets(split.test, split.trials, size)
    names = [(trial.setting, trial.number) for trial in trials]
    assert names == [(setting, k) for setting in SETTINGS for k in range(len(sets))]
    whole = {(trial.setting, trial.number): trial for trial in split.trials}
    identity = split.test.identity.to_numpy()
    for trial in trials:
        draw = whole[trial.setting, trial.number]  # fewer sets than draws: each its own
        for kind in ("query", "gallery"):
            rows = getattr(draw, kind)
            expected = [row for row in rows if identity[row] in sets[trial.number]]
            assert getattr(trial, kind).tolist() == expected, kind
    assert set(identity[trials[0].query]) == set(sets[0])


def test_more_sets_than_draws_take_them_again(regdb):
    split = load("regdb", regdb)
    trials = datasets.in_sets(split.test, split.trials, 1)
    people = sorted(split.test.identity.unique())
    assert len(people) > 1 and len(trials) == 2 * len(people)
    assert [t.number for t in trials] == 2 * list(range(len(people)))
    queries = np.concatenate([t.query for t in trials[: len(people)]])
    assert sorted(queries) == sorted(split.trials[0].query)


def test_galleries_are_the_same_in_every_call_and_leave_the_global_stream(sysu):
    random.seed(5)
    state = random.getstate()
    first, second = load("sysu", sysu, seed=0), load("sysu", sysu, label_noise=0.5, seed=1)
    assert random.getstate() == state
    for one, other in zip(first.trials, second.trials, strict=True):
        assert np.array_equal(one.gallery, other.gallery)


def test_sysu_ids_from_mat(sysu):
    expected = load("sysu", sysu)
    for part, people in SYSU_IDS.items():
        (sysu / f"exp/{part}_id.txt").unlink()
        savemat(sysu / f"exp/{part}_id.mat", {"id": np.array([people], np.uint16)})
    split = load("sysu", sysu)
    pd.testing.assert_frame_equal(split.train, expected.train)
    pd.testing.assert_frame_equal(split.test, expected.test)


def test_repeated_ids_do_not_repeat_images(sysu):
    n_queries = len(load("sysu", sysu).trials[0].query)
    write_lines(sysu / "exp/test_id.txt", ["14,5,110,14,5"])
    assert len(load("sysu", sysu).trials[0].query) == n_queries


def test_strays_change_nothing(sysu):
    expected = load("sysu", sysu)
    for place in [*sysu.glob("cam*"), *sysu.glob("cam*/*")]:
        for stray in ("Thumbs.db", ".DS_Store", "._0001.jpg"):
            (place / stray).touch()
    split = load("sysu", sysu)
    pd.testing.assert_frame_equal(split.test, expected.test)
    assert all(
        np.array_equal(a.gallery, b.gallery)
        for a, b in zip(split.trials, expected.trials, strict=True)
    )


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".bmp", ".PNG"])
def test_odd_extensions(sysu, suffix):
    n_images = len(load("sysu", sysu).test)
    for file in list(sysu.glob("cam*/0014/*.jpg")):
        file.rename(file.with_suffix(suffix))
    for gallery in ("random", "official"):
        assert len(load("sysu", sysu, gallery=gallery).test) == n_images


SYSU_FAULTS = {
    "no ids": (
        lambda root: (root / "exp/val_id.txt").unlink(),
        FileNotFoundError, "val_id.txt and val_id.mat are missing"),
    "ids not numbers": (
        lambda root: write_lines(root / "exp/test_id.txt", ["14,five"]),
        ValueError, "whole numbers"),
    "no test ids": (
        lambda root: write_lines(root / "exp/test_id.txt", []),
        ValueError, "no query or no gallery"),
    "shared id": (
        lambda root: write_lines(root / "exp/val_id.txt", ["2,14"]),
        ValueError, "identity 14 is in training and in test"),
    "no draws": (
        lambda root: (root / "exp/rand_perm_cam.mat").unlink(),
        FileNotFoundError, "use gallery='random'"),
    "broken draws": (
        lambda root: (root / "exp/rand_perm_cam.mat").write_bytes(b"x" * 200),
        ValueError, "cannot be read"),
    "draws of another shape": (
        lambda root: savemat(root / "exp/rand_perm_cam.mat", {"draws": np.eye(3)}),
        ValueError, "does not fit"),
    "lost image": (
        lambda root: (root / "cam4/0014/0002.jpg").unlink()
        or [p.unlink() for p in (root / "cam4/0014").iterdir() if p.name > "0003"],
        ValueError, "does not fit cam4/0014"),
    "lost cell": (
        lambda root: shutil.rmtree(root / "cam4/0014"),
        ValueError, "does not fit cam4/0014, which has 0 of 14"),
    "lost person": (
        lambda root: [shutil.rmtree(p) for p in root.glob("cam*/0110")],
        ValueError, "does not fit cam1/0110, which has 0 of"),
    "lost camera": (
        lambda root: shutil.rmtree(root / "cam4"),
        FileNotFoundError, "incomplete at .* folder cam4/"),
    "no test images": (
        lambda root: write_lines(root / "exp/test_id.txt", ["900"]),
        ValueError, "no query or no gallery"),
    "no training images": (
        lambda root: [write_lines(root / f"exp/{p}_id.txt", ["900"])
                      for p in ("train", "val")],
        ValueError, "no visible training image of anyone"),
    "one modality": (
        lambda root: [shutil.rmtree(root / f"cam{c}/0003") for c in INFRARED],
        ValueError, "no infrared training image of identity 3"),
}


@pytest.mark.parametrize("fault", SYSU_FAULTS)
def test_sysu_faults(sysu, fault):
    damage, error, sentence = SYSU_FAULTS[fault]
    damage(sysu)
    with pytest.raises(error, match=sentence):
        load("sysu", sysu, gallery="official")


@pytest.mark.parametrize("content", [
    np.array([[1], [2]], object), np.array(["a", "b"]), np.array([1.5, 2]),
    np.array([np.nan, 1]),
])
def test_sysu_ids_in_a_mat_that_are_no_numbers(sysu, content):
    (sysu / "exp/test_id.txt").unlink()
    savemat(sysu / "exp/test_id.mat", {"id": content})
    with pytest.raises(ValueError, match="test_id.mat must hold whole numbers"):
        load("sysu", sysu)
    report = verify("sysu", sysu).set_index("what")
    assert "whole numbers" in report.note["test identities"]


# LLCM


def test_llcm_parts(llcm):
    split = load("llcm", llcm)
    assert split.protocol == "llcm"
    counts = split.train.groupby(["modality", "identity"]).size().to_dict()
    assert counts == {("infrared", 4): 2, ("infrared", 7): 2,
                      ("visible", 4): 3, ("visible", 7): 3}
    visible = split.train[split.train.modality == "visible"]
    assert sorted(visible.camera.unique()) == [1, 3, 9]
    on_disk = sorted(p.relative_to(llcm).as_posix() for p in llcm.glob("test_*/*/*/*"))
    assert sorted(split.test.path) == on_disk


def test_llcm_trials(llcm):
    split = load("llcm", llcm)
    names = [(trial.setting, trial.number) for trial in split.trials]
    assert names == [(way, number) for way in DIRECTIONS for number in range(10)]
    for trial in split.trials:
        asking, asked = trial.setting.split("-to-")
        short = {"visible": "vis", "infrared": "nir"}[asked]
        queries = np.flatnonzero(split.test.modality == asking)
        assert np.array_equal(trial.query, queries)
        rng, naive = random.Random(trial.number), []
        for person in ("0002", "0012"):
            for camera in range(1, 10):
                place = llcm / f"test_{short}/cam{camera}/{person}"
                if place.is_dir():
                    images = sorted(place.iterdir())
                    naive.append(rng.choice(images).relative_to(llcm).as_posix())
        assert split.test.path[trial.gallery].tolist() == naive


# A folder of one's own


def test_folder_halves_are_a_function_of_the_trial(folder):
    splits = [load("folder", folder, split=trial) for trial in (1, *range(1, 10))]
    pd.testing.assert_frame_equal(splits[0].train, splits[1].train)
    assert len({frozenset(split.train.identity) for split in splits}) > 1
    for split in splits:
        assert split.protocol == "regdb"
        train, test = set(split.train.identity), set(split.test.identity)
        assert (len(train), len(test)) == (2, 3) and not train & test


def test_folder_cameras_and_names(folder):
    split = load("folder", folder)
    images = pd.concat([split.train, split.test])
    names = images.path.str.split("/").str[1]
    assert dict(zip(names, images.identity)) == dict(ann=0, bo=1, cy=2, di=3, ed=4)
    assert images.camera[names == "ann"].tolist() in ([1, 2], [2, 1])
    assert set(images.camera[names != "ann"]) == {3}


def test_folder_leaves_out_people_of_one_modality(folder):
    shutil.rmtree(folder / "infrared/bo")
    with pytest.warns(UserWarning, match=r"one modality only: 1 \(bo\)"):
        split = load("folder", folder)
    assert split.left_out == ("visible/bo/cam3/1.JPG",)
    assert summary(split).loc["left out", "images"] == 1
    assert {*split.train.identity, *split.test.identity} == {0, 2, 3, 4}


def test_folder_faults(folder):
    write(folder, "visible/bo/left/1.png")
    with pytest.raises(ValueError, match="no camera number at its end"):
        load("folder", folder)
    shutil.rmtree(folder / "visible")
    (folder / "visible/ann").mkdir(parents=True)
    with pytest.raises(ValueError, match="at least 2.*Not read: 5 images"):
        load("folder", folder)


# Joints, choices, missing sets


def test_joints_are_joined_on_the_path(regdb):
    assert not set(JOINT_COLUMNS) & set(load("regdb", regdb).train)
    paths = [p.relative_to(regdb).as_posix() for p in regdb.glob("*/*/*.bmp")]
    values = np.arange(len(paths) * 51.0).reshape(len(paths), 51)
    joints = pd.DataFrame(values, columns=JOINT_COLUMNS).assign(path=paths)
    joints[1:].to_csv(regdb / "joints.csv", index=False)
    split = load("regdb", regdb)
    for table in (split.train, split.test):
        for row in table.to_dict("records"):
            expected = values[paths.index(row["path"])]
            if row["path"] == paths[0]:
                expected = expected * np.nan
            np.testing.assert_array_equal([row[c] for c in JOINT_COLUMNS], expected)
    joints.drop(columns="y3").to_csv(regdb / "joints.csv", index=False)
    with pytest.raises(ValueError, match="no column y3"):
        load("regdb", regdb)
    pd.concat([joints, joints[:1]]).to_csv(regdb / "joints.csv", index=False)
    with pytest.raises(ValueError, match="a path twice"):
        load("regdb", regdb)
    (regdb / "joints.csv").write_bytes(b"")
    with pytest.raises(ValueError, match="joints.csv cannot be read as a table"):
        load("regdb", regdb)


@pytest.mark.parametrize("name", ["regdb", "sysu", "llcm", "folder"])
def test_a_missing_set_says_what_to_do(tmp_path, name):
    with pytest.raises(FileNotFoundError) as caught:
        load(name, tmp_path / "nowhere")
    sentence = str(caught.value)
    assert str(tmp_path / "nowhere") in sentence and SOURCES[name].obtain in sentence
    assert "-p dataset pocket-" in sentence and "\n" not in sentence


@pytest.mark.parametrize("name, lost", [
    ("regdb", "Thermal"), ("sysu", "cam2"),
    ("llcm", "test_nir"), ("folder", "infrared"),
])
def test_a_set_without_one_of_its_folders(request, name, lost):
    root = request.getfixturevalue(name)
    shutil.rmtree(root / lost)
    with pytest.raises(FileNotFoundError, match=f"incomplete at .* folder {lost}/"):
        load(name, root)


def test_a_set_is_absent_only_without_all_of_its_folders(regdb):
    for folder, state in (("Thermal", "incomplete"), ("Visible", "incomplete"),
                          ("idx", "not")):
        shutil.rmtree(regdb / folder)
        with pytest.raises(FileNotFoundError, match=f"RegDB is {state} at"):
            load("regdb", regdb)


def test_names():
    layouts = ("regdb", "sysu", "llcm", "folder", "pocket-regdb", "pocket-sysu")
    assert datasets.NAMES == layouts


def test_root_defaults_to_the_project(tmp_path, monkeypatch, regdb):
    monkeypatch.setattr(datasets, "project_root", lambda: tmp_path)
    (tmp_path / "data").mkdir()
    shutil.move(regdb, tmp_path / "data/regdb")
    assert load("regdb").root == tmp_path / "data" / "regdb"


def test_pocket_sets_are_trees(monkeypatch, regdb, sysu):
    trees = {"pocket-regdb": regdb, "pocket-sysu": sysu}
    monkeypatch.setattr(datasets, "pocket_root", trees.__getitem__)
    for name, layout in (("pocket-regdb", "regdb"), ("pocket-sysu", "sysu")):
        split = load(name)
        assert (split.name, split.protocol) == (name, layout)
        assert split.train.equals(load(layout, trees[name]).train)
        assert verify(name).ok.all()


@pytest.mark.parametrize("choice, sentence", [
    (dict(name="sisu"), "did you mean 'sysu'"),
    (dict(name="sysu", gallery="offical"), "did you mean 'official'"),
    (dict(name="regdb", gallery="official"), "no official gallery"),
    (dict(name="sysu", split=2), "one training split"),
])
def test_choices_that_do_not_exist(tmp_path, choice, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(root=tmp_path, **choice)


def test_summary(sysu):
    table = summary(load("sysu", sysu))
    assert list(table.index) == ["train", "test", *SETTINGS]
    assert table.loc["all-single", ["gallery", "trials"]].tolist() == [10, 10]
    assert table.loc["indoor-single", "gallery"] == 4
    assert table.loc["train", "identities"] == 3


# Verification against the published counts


@pytest.fixture
def roomy(tmp_path: Path):
    """A place for tens of thousands of files: in memory where that has a gigabyte."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or shutil.disk_usage(memory).free < 2**30:
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            yield Path(folder)


def spread(total: int, people) -> dict[int, int]:
    """As equal shares of `total` as whole numbers allow."""
    base, extra = divmod(total, len(people))
    return {person: base + (rank < extra) for rank, person in enumerate(people)}


def full_sysu(root: Path) -> Path:
    """A tree with the published counts of SYSU-MM01; who has which is made up."""
    people = list(range(1, 492))
    ids = {"train": people[:296], "val": people[296:395], "test": people[395:]}
    test = ids["test"]
    shares = {  # camera -> images of each person
        1: spread(22258, people[:395]) | spread(1374, test[:56]),
        2: spread(1565, test[:56]),
        3: spread(11909, people[:395]) | spread(1088, test[:56])
           | spread(795, test[56:93]),
        4: spread(1918, test[:94]),
        5: spread(1918, test[:95]),
        6: spread(1920, test),
    }
    sizes = {(p, c): n for c, share in shares.items() for p, n in share.items()}
    return sysu_tree(root, ids, sizes)


def test_verify_a_complete_regdb(roomy):
    root = regdb_tree(roomy, people=412, images=10)
    report = verify("regdb", root)
    assert list(report) == ["what", "expected", "found", "ok", "note"]
    assert report.ok.all(), report[~report.ok]
    lost = sorted(root.glob("Thermal/31/*"))[:4]
    for file in lost:
        file.unlink()
    (root / "idx/train_visible_7.txt").unlink()
    report = verify("regdb", root).set_index("what")
    assert set(report.index[~report.ok]) == {
        "images", "images, infrared", "listed images that are missing",
        "unreadable index files", "splits that cannot be loaded",
    }
    assert report.found["splits that cannot be loaded"] == 10
    assert report.found["listed images that are missing"] == 4
    first = ", ".join(f.relative_to(root).as_posix() for f in lost[:3])
    assert report.note["listed images that are missing"] == first


def test_verify_a_complete_sysu(roomy):
    root = full_sysu(roomy)
    report = verify("sysu", root)
    assert report.ok.all(), report[~report.ok]
    assert set(PUBLISHED.what[PUBLISHED.layout == "sysu"]) <= set(report.what)
    split = load("sysu", root, gallery="official")  # opens none of its one-byte images
    assert len(split.train) == 22258 + 11909 and len(split.trials) == 40
    (root / "cam2/0400/0003.jpg").unlink()
    (root / "cam6/0401/0003.jpg").write_bytes(b"")
    shutil.rmtree(root / "cam3")
    report = verify("sysu", root).set_index("what")
    assert report.note["missing folders"] == "cam3"
    assert report.note["empty image files"] == "cam6/0401/0003.jpg"
    unlike = report.note["cells unlike rand_perm_cam.mat"]
    assert unlike.startswith("cam2/0400 (27 of 28)")
    assert report.found["test images, camera 2"] == 1564
    assert report.found["queries"] == 1920


def test_verify_a_complete_llcm(roomy):
    for short, n_train, n_test, camera in (("vis", 16946, 8680, 5), ("nir", 13975, 7166, 6)):
        lines = [
            f"{write(roomy, f'{short}/{p:04d}/{p:04d}_c01_{i}.jpg')} {p - 1}"
            for p, n in spread(n_train, range(1, 714)).items() for i in range(n)
        ]
        write_lines(roomy / f"idx/train_{short}.txt", lines)
        for person, n in spread(n_test, range(714, 1065)).items():
            for image in range(n):
                write(roomy, f"test_{short}/cam{camera}/{person:04d}/{image}.jpg")
    ids = ",".join(map(str, range(714, 1065)))
    write_lines(roomy / "idx/test_id.txt", [ids])
    report = verify("llcm", roomy)
    assert report.ok.all(), report[~report.ok]
    write_lines(roomy / "idx/test_id.txt", [ids + ",1,1100"])
    report = verify("llcm", roomy).set_index("what")
    assert report.note["identities in training and test"] == "1"
    assert report.note["listed identities without images"] == "1, 1100"


def test_verify_small_trees_keeps_to_the_rules(regdb, sysu, llcm, folder):
    trees = {"regdb": regdb, "sysu": sysu, "llcm": llcm, "folder": folder}
    for name, root in trees.items():
        report = verify(name, root)
        rule = report.expected == 0
        assert report.ok[rule].all(), report[~report.ok]
        assert not report.ok[~rule].any()


def test_verify_counts_indoor_queries_with_a_match(sysu):
    """Person 5 is in camera 2 only, which is dropped for the queries of camera 3."""
    report = verify("sysu", sysu).set_index("what")
    matched = [*sysu.glob("cam3/0014/*"), *sysu.glob("cam3/0110/*"),
               *sysu.glob("cam6/0014/*"), *sysu.glob("cam6/0110/*")]
    assert list(sysu.glob("cam3/0005/*"))
    assert report.found["indoor queries with a match"] == len(matched)


@pytest.mark.parametrize("name", ["regdb", "sysu", "llcm", "folder"])
def test_verify_survives_anything(tmp_path, name):
    absent = verify(name, tmp_path / "nowhere")
    assert not absent.ok[absent.what == "missing folders"].item()
    for path in ("idx/train_visible_1.txt", "idx/train_vis.txt", "idx/test_id.txt",
                 "exp/test_id.txt", "exp/train_id.mat", "exp/rand_perm_cam.mat", "cam1",
                 "Visible"):
        write(tmp_path, path)
    damaged = verify(name, tmp_path)
    assert not damaged.ok.all() and damaged.found.dtype.kind == "i"


def test_verify_a_folder(folder):
    assert verify("folder", folder).ok.all()
    shutil.rmtree(folder / "visible/cy")
    (folder / "visible/bo/cam3/1.JPG").write_bytes(b"")
    report = verify("folder", folder).set_index("what")
    assert report.note["identities of one modality only"] == "cy"
    assert report.note["empty image files"] == "visible/bo/cam3/1.JPG"
    (folder / "visible/bo/left").mkdir()
    report = verify("folder", folder).set_index("what")
    assert report.ok["splits that cannot be loaded"]  # the folder is empty
    assert report.note["folders without images"] == "visible/bo/left"
    write(folder, "visible/bo/left/1.png")
    report = verify("folder", folder).set_index("what")
    assert "bo/left has no" in report.note["splits that cannot be loaded"]


def test_every_expected_number_has_a_source():
    assert PUBLISHED.source.str.len().gt(0).all()
    assert not PUBLISHED.duplicated(["layout", "what"]).any()


def test_the_report_is_printed_whole_with_a_verdict(regdb, folder):
    text = repr(verify("folder", folder))
    assert text.endswith("\ncomplete") and "..." not in text
    report = verify("regdb", regdb)
    assert len(repr(report).splitlines()) == len(report) + 2
    assert repr(report).splitlines()[-1].startswith("not complete: 7 of")
    assert "not complete" in report._repr_html_()
    assert type(report[~report.ok]) is pd.DataFrame
    shutil.rmtree(folder)
    for name in ("<script>", "b"):
        for modality in ("visible", "infrared"):
            write(folder, f"{modality}/{name}/1.png")
    (folder / "visible/<script>/1.png").write_bytes(b"")
    assert "<script>" not in verify("folder", folder)._repr_html_()


# A folder of one's own: every file is read, or counted


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_what_pillow_reads_is_read(folder, suffix):
    Image.init()
    assert Image.registered_extensions().get(suffix) in Image.OPEN
    for file in list(folder.glob("infrared/*/**/*.JPG")):
        file.rename(file.with_suffix(suffix))
    split = load("folder", folder)
    assert len(split.train) + len(split.test) == 10 and not split.left_out


def test_images_too_high_or_too_deep_are_counted(folder):
    lost = [write(folder, path) for path in (
        "a.png", "more/b.png", "visible/c.png", "visible/bo/cam3/deep/d.png",
    )]
    write(folder, "visible/bo/e.heic")
    with pytest.warns(UserWarning, match="images that are not read: 4"):
        split = load("folder", folder)
    assert split.left_out == tuple(sorted(lost))
    assert summary(split).loc["left out", "images"] == 4
    report = verify("folder", folder).set_index("what")
    assert report.found["images that are not read"] == 4
    assert report.note["other files"] == "visible/bo/e.heic"
    assert not report.ok["images that are not read"]


def test_a_folder_with_no_image_in_place_says_what_it_holds(tmp_path):
    root = tmp_path / "flat"
    for modality in ("visible", "infrared"):
        for image in range(6):
            write(root, f"{modality}/{image}.png")
    write(root, "visible/film.mp4")
    sentence = "visible/<identity>/.*Not read: 12 images and 1 other files, the first is"
    with pytest.raises(ValueError, match=sentence):
        load("folder", root)
    crops = list_folder(root)
    assert len(crops) == 12 and set(crops.identity) == {""}
    assert crops.modality.value_counts().to_dict() == {"visible": 6, "infrared": 6}


@pytest.mark.parametrize("cameras", [("cam1", "cam2"), ("1", "2"), ("Camera 1", "Camera 2")])
def test_cameras_above_people_are_refused(tmp_path, cameras):
    people = [f"{person:04d}" for person in range(1, 8)]
    for modality in ("visible", "infrared"):
        for camera in cameras:
            for person in people:
                write(tmp_path, f"mine/{modality}/{camera}/{person}/1.png")
                write(tmp_path, f"right/{modality}/{person}/{camera}/1.png")
    with pytest.raises(ValueError, match=f"visible/{cameras[0]} looks like a camera"):
        load("folder", tmp_path / "mine")
    report = verify("folder", tmp_path / "mine").set_index("what")
    assert "looks like a camera" in report.note["splits that cannot be loaded"]
    split = load("folder", tmp_path / "right")
    assert {*split.train.identity, *split.test.identity} == set(range(1, 8))


def test_few_people_and_many_cameras_are_told_by_their_names(tmp_path):
    for modality in ("visible", "infrared"):
        for person in ("ann", "bo"):
            for camera in range(1, 7):
                write(tmp_path, f"{modality}/{person}/cam{camera}/1.png")
    assert load("folder", tmp_path).test.camera.nunique() == 6


def test_a_folder_that_is_divided_already(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "mine/train")
    shutil.copytree(folder, tmp_path / "mine/test")
    with pytest.raises(ValueError, match="is in training and in test"):
        load("folder", tmp_path / "mine")
    for place in list((tmp_path / "mine/test").glob("*/*")):
        place.rename(place.with_name(f"other {place.name}"))
    split = load("folder", tmp_path / "mine")
    assert split.train.path.str.startswith("train/").all() and len(split.train) == 10
    assert split.test.path.str.startswith("test/").all() and len(split.test) == 10
    assert verify("folder", tmp_path / "mine").found.iloc[-3:].sum() == 0
    with pytest.raises(ValueError, match="divided already"):
        load("folder", tmp_path / "mine", split=2)
    shutil.rmtree(tmp_path / "mine/test/infrared")
    with pytest.raises(FileNotFoundError, match="folder test/infrared/"):
        load("folder", tmp_path / "mine")


# Paths in lists


SPELLINGS = {
    "leading slash": lambda line, root: f"/{line}",
    "dots": lambda line, root: f"./{line}",
    "absolute": lambda line, root: f"{root}/{line}",
    "of another machine": lambda line, root: f"D:\\sets\\RegDB\\{line}",
    "backslashes": lambda line, root: line.replace("/", "\\"),
    "prefix": lambda line, root: f"RegDB/{line}",
    "doubled": lambda line, root: line.replace("/", "//"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_paths_as_others_write_them(tmp_path, spelling):
    root = write_tree("regdb", tmp_path / "regdb", n_train=2, n_test=2, n_images=1, size=(16, 8))
    expected = load("regdb", root)
    for file in root.glob("idx/*.txt"):
        lines = file.read_text().splitlines()
        write_lines(file, [SPELLINGS[spelling](line, root) for line in lines])
    assert verify("pocket-regdb", root).verdict == "complete"
    split = load("regdb", root)
    pd.testing.assert_frame_equal(split.train, expected.train)
    assert len(pack(root, split.train.path, (16, 8), cache=tmp_path)) == len(split.train)


def spoil(root, name, change):
    """Change the first line of an index file."""
    lines = (root / name).read_text().splitlines()
    write_lines(root / name, [change(lines[0]), *lines[1:]])


def copy_first(root, name, spelling):
    """Repeat the first line of an index file in another spelling."""
    line = (root / name).read_text().splitlines()[0]
    _append(root / name, line.replace("/", spelling, 1) + "\n")


def same_lists(root):
    """The infrared test images are the visible ones."""
    shutil.copy(root / "idx/test_visible_1.txt", root / "idx/test_thermal_1.txt")


REGDB_SILENT = {
    "two spellings": (lambda r: copy_first(r, "idx/train_visible_1.txt", "/./"), "twice",
                      "images listed twice"),
    "two slashes": (lambda r: copy_first(r, "idx/test_visible_1.txt", "//"), "twice",
                    "images listed twice"),
    "both modalities": (same_lists, "as visible and as infrared",
                        "images of the wrong modality"),
    "the wrong folder": (
        lambda r: spoil(r, "idx/test_thermal_1.txt", lambda x: x.replace("Thermal", "Visible")
                        .replace("_0.bmp", "_1.bmp")),
        "as infrared", "images of the wrong modality"),
    "outside": (lambda r: spoil(r, "idx/test_visible_1.txt", lambda x: f"../regdb/{x}"),
                r"has \.\. in it", "unreadable index files"),
    "an identity in one list": (
        lambda r: _append(r / "idx/train_visible_1.txt", write(r, "Visible/77/a.bmp") + " 3\n"),
        "no infrared training image", "identities of one modality only"),
    "thirty digits": (
        lambda r: _append(r / "idx/train_visible_1.txt", write(r, f"Visible/{'7' * 30}/a.bmp") + " 3\n"),
        "not an identity number", "unreadable index files"),
    "a label of thirty digits": (
        lambda r: _append(r / "idx/train_visible_1.txt", write(r, "Visible/7/b.bmp") + f" {'3' * 30}\n"),
        "not a path and a label", "unreadable index files"),
    "queries without a match": (
        lambda r: _append(r / "idx/test_visible_1.txt", write(r, "Visible/77/a.bmp") + " 3\n"),
        None, "queries without a match"),
}


@pytest.mark.parametrize("fault", REGDB_SILENT)
def test_faults_that_were_silent(regdb, fault):
    """`load` refuses or says it, and `verify` counts it."""
    damage, sentence, row = REGDB_SILENT[fault]
    damage(regdb)
    report = verify("regdb", regdb).set_index("what")
    assert not report.ok[row]
    if sentence:
        with pytest.raises(ValueError, match=sentence):
            load("regdb", regdb)
        assert not report.ok["splits that cannot be loaded"]
    else:
        assert any(row in said for said in load("regdb", regdb).departures)


def test_llcm_image_in_both_lists(llcm):
    line = (llcm / "idx/train_vis.txt").read_text().splitlines()[0]
    _append(llcm / "idx/train_nir.txt", line + "\n")
    with pytest.raises(ValueError, match="as visible and as infrared"):
        load("llcm", llcm)
    assert not verify("llcm", llcm).set_index("what").ok["images of the wrong modality"]


def test_equal_images_are_reported(regdb, sysu, folder):
    (regdb / "Visible/2/f_2_0.bmp").write_bytes((regdb / "Visible/1/f_1_0.bmp").read_bytes())
    report = verify("regdb", regdb).set_index("what")
    pair = "Visible/1/f_1_0.bmp = Visible/2/f_2_0.bmp"
    assert report.note["equal images of two people"] == pair
    assert report.ok["equal images of both modalities"]
    (folder / "infrared/bo/cam3/1.JPG").write_bytes((folder / "visible/bo/cam3/1.JPG").read_bytes())
    report = verify("folder", folder).set_index("what")
    assert report.found["equal images of both modalities"] == 1
    assert report.ok["equal images of two people"]
    (sysu / "cam1/0001/0001.jpg").write_bytes((sysu / "cam2/0014/0001.jpg").read_bytes())
    report = verify("sysu", sysu).set_index("what")
    assert report.found["equal images in training and test"] == 1


# SYSU-MM01 of others


def test_sysu_folders_without_padding(sysu):
    expected = load("sysu", sysu, gallery="official")
    for place in list(sysu.glob("cam*/*")):
        place.rename(place.with_name(str(int(place.name))))
    split = load("sysu", sysu, gallery="official")
    pairs = zip(split.trials, expected.trials, strict=True)
    assert all(np.array_equal(one.gallery, other.gallery) for one, other in pairs)
    assert verify("sysu", sysu).set_index("what").ok["listed identities without images"]


BAD_DRAWS = {
    "three cameras": lambda draws: draws[:3],
    "NaN": lambda draws: _with_cell(draws, np.full((10, 4), np.nan)),
    "half numbers": lambda draws: _with_cell(draws, np.full((10, 4), 1.5)),
    "three rows": lambda draws: _with_cell(draws, np.ones((3, 4))),
    "text": lambda draws: _with_cell(draws, np.array([["a", "b"]] * 10)),
}


def _with_cell(draws, cell):
    """The draws with another first cell."""
    draws[0, 0][0, 0] = cell
    return draws


@pytest.mark.parametrize("fault", BAD_DRAWS)
def test_gallery_files_that_cannot_be_used(sysu, fault):
    from scipy.io import loadmat

    file = sysu / "exp/rand_perm_cam.mat"
    draws = loadmat(file)["rand_perm_cam"]
    savemat(file, {"rand_perm_cam": BAD_DRAWS[fault](draws)})
    with pytest.raises(ValueError, match="does not fit SYSU-MM01"):
        load("sysu", sysu, gallery="official")
    report = verify("sysu", sysu).set_index("what")
    assert "does not fit" in report.note["cells unlike rand_perm_cam.mat"]
    assert report.found["splits that cannot be loaded"] == 1


def test_numbers_of_thirty_digits(sysu, folder):
    write_lines(sysu / "exp/test_id.txt", ["9" * 30])
    with pytest.raises(ValueError, match="whole numbers"):
        load("sysu", sysu)
    assert not verify("sysu", sysu).set_index("what").ok["splits that cannot be loaded"]
    for modality in ("visible", "infrared"):
        (folder / modality / "bo").rename(folder / modality / ("9" * 30))
    assert verify("folder", folder).verdict == "complete"
    split = load("folder", folder)
    assert max(*split.train.identity, *split.test.identity) == 4
    write(folder, f"visible/ann/cam{'1' * 30}/1.png")
    assert not verify("folder", folder).set_index("what").ok["splits that cannot be loaded"]


# Queries that nobody can answer


def dropped_by_evaluation(split, trial):
    """The same count, from `evaluate` on any distances."""
    ids, cams = (split.test[c].to_numpy() for c in ("identity", "camera"))
    q, g = trial.query, trial.gallery
    scores = evaluate(np.zeros((len(q), len(g))), ids[q], ids[g], cams[q], cams[g], split.protocol)
    return scores.n_dropped


@pytest.mark.parametrize("name", ["regdb", "sysu", "llcm", "folder"])
def test_queries_without_match_are_those_that_the_evaluation_drops(request, name):
    root = request.getfixturevalue(name)
    if name == "llcm":  # person 12 is left with infrared camera 1 only
        shutil.rmtree(root / "test_nir/cam9/0012")
    split = load(name, root)
    counted = [without_match(t, split.test, split.protocol) for t in split.trials]
    assert counted == [dropped_by_evaluation(split, t) for t in split.trials]
    assert (max(counted) > 0) == (name in ("sysu", "llcm"))
    table = summary(split)
    for trial, n in zip(split.trials, counted):
        assert table.loc[trial.setting, "without match"] >= n


def test_wrong_labels_are_made_when_asked_for(regdb):
    plain, noisy = load("regdb", regdb), load("regdb", regdb, label_noise=0.3, seed=2)
    assert noisy.train.identity.equals(plain.train.identity)
    assert (noisy.train.label != plain.train.label).sum() == 6
    assert noisy.train.equals(datasets.with_noise(plain, 0.3, 2).train)
    with pytest.raises(ValueError, match="two identities or more"):
        load("regdb", regdb, label_noise=1.5)


def test_a_setting_without_an_answer_is_refused(llcm):
    for place in list(llcm.glob("test_*/cam[39]")):
        shutil.rmtree(place)
    with pytest.raises(ValueError, match="has a match that it may see"):
        load("llcm", llcm)


# Listing, and what says that a tree was rendered


def test_links_are_followed_but_not_in_circles(folder, tmp_path):
    shutil.move(folder / "visible/bo", tmp_path / "elsewhere")
    (folder / "visible/bo").symlink_to(tmp_path / "elsewhere")
    (folder / "visible/bo/again").symlink_to(folder / "visible")
    (folder / "visible/cy/broken.png").symlink_to(tmp_path / "nowhere")
    listing = list_tree(folder)
    assert listing.has("visible/bo/cam3/1.JPG") and not listing.has("visible/cy/broken.png")
    assert len(listing.sizes) == 11


def test_a_matlab_file_that_ends_a_process_is_refused(sysu, monkeypatch):
    """scipy 1.17 may crash on one; another process tries it first."""
    file = sysu / "exp" / "rand_perm_cam.mat"
    killed = subprocess.CompletedProcess([], -11)
    monkeypatch.setattr(datasets.subprocess, "run", lambda *_, **__: killed)
    datasets._opens.cache_clear()
    with pytest.raises(ValueError, match="rand_perm_cam.mat cannot be read as MATLAB's: copy"):
        load("sysu", sysu, gallery="official")
    datasets._opens.cache_clear()
    monkeypatch.undo()
    assert load("sysu", sysu, gallery="official") and file.is_file()


@pytest.mark.parametrize("cell", ["left", "inf", "-inf", "", "1,5"])
def test_joints_that_are_no_numbers_are_refused(regdb, cell):
    paths = load("regdb", regdb).train.path
    joints = pd.DataFrame(0.5, paths, JOINT_COLUMNS).astype({"x3": object})
    joints.loc[paths[2], "x3"] = cell
    joints.to_csv(regdb / "joints.csv")
    with pytest.raises(ValueError, match=f"for x3 of {paths[2]}: it needs one row"):
        load("regdb", regdb)


def test_a_folder_that_may_not_be_opened(folder, monkeypatch):
    scandir = datasets.os.scandir

    def refuse(place):
        if str(place).endswith("visible/bo"):
            raise PermissionError(place)
        return scandir(place)

    monkeypatch.setattr(datasets.os, "scandir", refuse)
    for read in (partial(load, "folder"), list_folder):
        with pytest.raises(PermissionError, match="visible/bo may not be opened"):
            read(folder)
    report = verify("folder", folder).set_index("what")
    assert report.note["folders that may not be opened"] == "visible/bo"


def test_joints_do_not_make_a_set_rendered(tmp_path):
    root = write_tree("regdb", tmp_path / "tree", n_train=2, n_test=2, n_images=1, size=(16, 8))
    split = load("regdb", root)
    assert split.rendered and has_rendered_mark(root) and not split.departures
    mark = root / "rendered.json"
    for content in ("", "[]", "{}", mark.read_text().replace('"seed": 0', '"seed": 1')):
        mark.write_text(content)
        split = load("regdb", root)
        assert "x0" in split.train and not split.rendered and split.departures
    mark.unlink()
    assert not load("regdb", root).rendered
