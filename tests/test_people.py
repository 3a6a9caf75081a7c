"""Rendered people: the same everywhere, in the layouts of the data sets, repaired.

Run as a script, this file writes the reference sheet anew.
"""

import csv
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from afen import people
from afen.core import digest
from afen.people import SPECTRA, Difficulty, render, sample_person, write_tree

SHEET = Path(__file__).with_name("people.png")
DIGEST = Path(__file__).with_name("people.digest")
SMALL = dict(n_train=5, n_test=4, n_images=3, size=(48, 24), seed=5)
TINY = people.TreeSpec("regdb", n_train=2, n_test=2, n_images=1, size=(48, 24))


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, Path]:
    """One small tree of each layout."""
    root = tmp_path_factory.mktemp("trees")
    return {name: write_tree(name, root / name, **SMALL) for name in people.LAYOUTS}


@pytest.fixture
def tiny(monkeypatch) -> str:
    """The name of a pocket set of eight images."""
    monkeypatch.setitem(people.POCKET_SETS, "tiny", TINY)
    return "tiny"


def images(root: Path, pattern: str) -> list[str]:
    """Paths below the root that match, sorted."""
    return sorted(p.relative_to(root).as_posix() for p in root.glob(pattern))


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a tree and its bytes."""
    files = (p for p in root.rglob("*") if p.is_file())
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


def lines(path: Path) -> list[tuple[str, int]]:
    """Path and label of each line of an index file."""
    pairs = (line.split(" ") for line in path.read_text().splitlines())
    return [(name, int(label)) for name, label in pairs]


def joints_of(root: Path) -> dict[str, np.ndarray]:
    """joints.csv as path -> [17, 3]."""
    with (root / "joints.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", *(f"{c}{k}" for k in range(17) for c in "xyv")]
    return {name: np.array(values, float).reshape(17, 3) for name, *values in rows}


# -- one image ------------------------------------------------------------------------


def test_reference_sheet_is_as_stored():
    stored = np.array(Image.open(SHEET))
    assert digest(stored) == DIGEST.read_text().strip(), "people.png was changed"
    assert people.check_reference(SHEET) <= 1


def test_reference_sheet_shows_all_spectra():
    stored = np.array(Image.open(SHEET)).astype(int)  # [288, 288, 3]
    assert stored.shape == (288, 288, 3)
    visible, near, thermal = np.split(stored, 3)
    assert np.ptp(visible, axis=2).max() > 50
    assert not np.ptp(near, axis=2).any() and not np.ptp(thermal, axis=2).any()
    assert not np.array_equal(near, thermal)


def test_check_reference_refuses_what_it_must(tmp_path):
    with pytest.raises(FileNotFoundError, match="is missing"):
        people.check_reference(tmp_path / "none.png")
    sheet = np.array(Image.open(SHEET))
    sheet[10, 10] ^= 4
    Image.fromarray(sheet).save(tmp_path / "forged.png")
    with pytest.raises(ValueError, match="grey levels off"):
        people.check_reference(tmp_path / "forged.png")


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_an_image_can_be_rendered_alone(spectrum):
    camera = people.CAMERAS["sysu"][3]
    before, joints = render(sample_person(3, 9), spectrum, camera, 4)
    for other in range(5):
        render(sample_person(3, other), spectrum, camera, other)
    after, again = render(sample_person(3, 9), spectrum, camera, 4)
    assert np.array_equal(before, after) and np.array_equal(joints, again)


def test_another_process_renders_the_same_bits():
    code = (
        "from afen import people; from afen.core import digest; "
        "print(digest(people.reference_sheet()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == digest(people.reference_sheet()), run.stderr


@pytest.mark.parametrize("change", ["seed", "identity", "view", "camera", "spectrum"])
def test_everything_named_matters(change):
    def draw(seed=0, identity=1, view=2, camera=0, spectrum="visible"):
        person, place = sample_person(seed, identity), people.CAMERAS["sysu"][camera]
        return render(person, spectrum, place, view)[0]

    other = {"camera": 4, "spectrum": "near-infrared"}.get(change, 7)
    assert not np.array_equal(draw(), draw(**{change: other}))


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_person_stands_out(spectrum):
    """Without disturbance, many pixels are not the grey of the wall."""
    off = dict.fromkeys(("noise", "clutter", "occlusion", "light"), 0)
    person, camera = sample_person(0, 1), people.CAMERAS["folder"][0]
    image, joints = render(person, spectrum, camera, 0, difficulty=Difficulty(**off))
    wall = image[0, 0].astype(int)
    body = abs(image.astype(int) - wall).max(2) > 3  # [H, W]
    assert 0.08 < body.mean() < 0.5
    x, y = joints[:, :2].T.astype(int)
    assert body[y, x].mean() > 0.75  # joints lie on the body, some of it wall-grey


@pytest.mark.parametrize("camera", people.CAMERAS["sysu"], ids=lambda c: c.room)
def test_joints_are_consistent(camera):
    drawn = [render(sample_person(4, i), "visible", camera, i)[1] for i in range(25)]
    x, y, visible = np.array(drawn).transpose(2, 0, 1)  # [25, 17] each
    on_image = (x >= 0) & (x < 48) & (y >= 0) & (y < 96)
    assert on_image.mean() > 0.98
    assert set(np.unique(visible)) <= {0.0, 1.0}
    assert not visible[~on_image].any()
    eyes, hips, ankles = y[:, 1:3], y[:, 11:13], y[:, 15:17]
    assert (eyes.max(1) < hips.min(1)).all() and (hips.max(1) < ankles.max(1)).all()


def test_what_stands_in_front_hides_joints():
    camera, open_view = people.CAMERAS["folder"][0], Difficulty(occlusion=0)
    blocked, free = 0, 0
    for i in range(40):
        person = sample_person(0, i)
        with_it = render(person, "visible", camera, i, difficulty=Difficulty())[1]
        without = render(person, "visible", camera, i, difficulty=open_view)[1]
        assert np.array_equal(with_it[:, :2], without[:, :2])
        assert (with_it[:, 2] <= without[:, 2]).all()
        blocked, free = blocked + with_it[:, 2].sum(), free + without[:, 2].sum()
    assert 0.5 * free < blocked < free


def test_left_is_the_persons_own():
    """Seen from the front, the person's left is on the right of the image."""
    still = Difficulty(viewpoint=0, pose=0, framing=0)
    person, camera = sample_person(0, 1, still), people.CAMERAS["folder"][0]
    x = render(person, "visible", camera, 0, difficulty=still)[1][:, 0]
    assert (x[[5, 11, 15]] > x[[6, 12, 16]]).all()


def test_the_body_hides_its_own_joints():
    """From behind, the nose is not visible; from the front, it is."""
    calm = Difficulty(viewpoint=0.01, pose=0, framing=0, occlusion=0)  # within 1 degree
    for heading, expected in ((0, 1), (180, 0)):
        camera = replace(people.CAMERAS["folder"][0], heading=heading / 0.01)
        for i in range(10):
            person = sample_person(0, i)
            _, joints = render(person, "visible", camera, i, difficulty=calm)
            assert joints[0, 2] == expected


@pytest.mark.parametrize("size", [(64, 32), (144, 72)])
def test_joints_scale_with_the_image(size):
    person, camera = sample_person(0, 2), people.CAMERAS["regdb"][0]
    image, joints = render(person, "visible", camera, 1, size=size)
    _, usual = render(person, "visible", camera, 1)
    assert image.shape == (*size, 3)
    assert np.allclose(joints[:, :2] * 96 / size[0], usual[:, :2], atol=1e-6)


@pytest.mark.parametrize("knob", ["noise", "dye"])
@pytest.mark.parametrize("value", [-0.1, 2.1, float("nan")])
def test_knobs_have_bounds(knob, value):
    with pytest.raises(ValueError, match=f"{knob} is"):
        Difficulty(**{knob: value})


def test_unknown_names_are_refused(tmp_path):
    camera = people.CAMERAS["folder"][0]
    with pytest.raises(ValueError, match="did you mean 'thermal'"):
        render(sample_person(0, 0), "termal", camera, 0)
    with pytest.raises(ValueError, match="did you mean 'sysu'"):
        write_tree("sysuu", tmp_path / "tree")
    with pytest.raises(ValueError, match="did you mean 'pocket-sysu'"):
        people.pocket_root("pocket-syzu", tmp_path)
    assert not list(tmp_path.iterdir())


# -- trees ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", people.LAYOUTS)
def test_joints_name_every_image_once(trees, layout):
    root = trees[layout]
    kinds = {".bmp", ".jpg", ".png"}
    on_disk = {name for name in contents(root) if Path(name).suffix in kinds}
    assert set(joints_of(root)) == on_disk
    picture = Image.open(root / min(on_disk))
    assert picture.size == (24, 48) and picture.mode == "RGB"


@pytest.mark.parametrize("layout", people.LAYOUTS)
def test_a_second_writing_gives_the_same_bytes(trees, layout, tmp_path):
    again = write_tree(layout, tmp_path / "again", **SMALL)
    assert contents(again) == contents(trees[layout])


def test_another_seed_gives_other_people(trees, tmp_path):
    other = write_tree("folder", tmp_path / "other", **(SMALL | {"seed": 6}))
    ours, theirs = contents(trees["folder"]), contents(other)
    assert set(ours) == set(theirs)
    assert not any(ours[name] == theirs[name] for name in ours)


def test_regdb_folders_and_pairs(trees):
    root = trees["regdb"]
    visible, thermal = images(root, "Visible/*/*.bmp"), images(root, "Thermal/*/*.bmp")
    assert len(visible) == len(thermal) == 9 * 3
    assert {name.split("/")[1] for name in visible} == {str(i) for i in range(1, 10)}
    joints = joints_of(root)
    for one, other in zip(visible, thermal):
        assert one.split("/")[1] == other.split("/")[1]
        assert np.array_equal(joints[one], joints[other])  # the same moment
    assert not np.ptp(np.array(Image.open(root / thermal[0])), axis=2).any()


def test_regdb_index(trees):
    root = trees["regdb"]
    assert len(list((root / "idx").iterdir())) == 40
    halves = set()
    for trial in range(1, 11):
        people_of = {}
        for half, count in (("train", 5), ("test", 4)):
            for kind in ("visible", "thermal"):
                entries = lines(root / f"idx/{half}_{kind}_{trial}.txt")
                assert len(entries) == count * 3
                assert all((root / name).is_file() for name, _ in entries)
                assert all(name.startswith(kind.title()) for name, _ in entries)
                pairs = {(name.split("/")[1], label) for name, label in entries}
                assert sorted(label for _, label in pairs) == list(range(count))
                assert people_of.setdefault(half, pairs) == pairs  # alike in both kinds
        train, test = ({i for i, _ in people_of[half]} for half in ("train", "test"))
        assert not train & test and len(train | test) == 9
        halves.add(frozenset(train))
    assert len(halves) > 1  # the trials differ


def sysu_ids(root: Path, name: str) -> list[int]:
    """The identities of exp/<name>_id.txt, after comparing them with the .mat."""
    text = (root / f"exp/{name}_id.txt").read_text()
    assert text.count("\n") <= 1 and " " not in text
    ids = [int(word) for word in text.strip().split(",")]
    matlab = scipy.io.loadmat(root / f"exp/{name}_id.mat")["id"]
    assert matlab.shape == (1, len(ids)) and matlab[0].tolist() == ids
    return ids


def test_sysu_folders_and_groups(trees):
    root = trees["sysu"]
    train, val, test = (sysu_ids(root, name) for name in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (4, 1, 4)
    assert sorted(train + val + test) == sysu_ids(root, "available")
    assert len(set(train + val + test)) == 9
    names = images(root, "cam[1-6]/[0-9][0-9][0-9][0-9]/[0-9][0-9][0-9][0-9].jpg")
    assert len(names) == len(joints_of(root))
    for name in names:  # where the released loaders look for camera and identity
        assert name[-15] in "123456" and 1 <= int(name[-13:-9]) <= 9
    for number in range(1, 7):
        for group in (train, test):
            assert any((root / f"cam{number}/{i:04d}").is_dir() for i in group)


def test_sysu_infrared_is_grey_and_visible_is_not(trees):
    def colour(number: int) -> int:
        some = images(trees["sysu"], f"cam{number}/*/0001.jpg")
        stack = np.array([np.array(Image.open(trees["sysu"] / name)) for name in some])
        return int(np.ptp(stack.astype(int), axis=3).max())

    assert all(colour(n) == 0 for n in (3, 6))
    assert all(colour(n) > 30 for n in (1, 2, 4, 5))


def test_sysu_gallery_draws(trees):
    """rand_perm_cam.mat: cell [camera - 1][identity - 1] is [10 trials, n images]."""
    root = trees["sysu"]
    cells = scipy.io.loadmat(root / "exp/rand_perm_cam.mat")["rand_perm_cam"]
    assert cells.shape == (6, 1)
    for number in range(1, 7):
        column = cells[number - 1][0].squeeze()
        assert column.shape == (9,)
        for i in range(1, 10):
            n = len(images(root, f"cam{number}/{i:04d}/*.jpg"))
            assert n in (0, 3) and column[i - 1].shape == (10, n)
            assert all(sorted(row) == list(range(1, n + 1)) for row in column[i - 1])


def test_sysu_attendance_resembles_the_real_one():
    spec = people.POCKET_SETS["pocket-sysu"]
    pairs = {(s.identity, s.camera.number) for s in people._SHOTS["sysu"](spec)}
    share = [np.mean([(i, n) in pairs for i in spec.identities]) for n in range(1, 7)]
    assert 0.4 < share[0] < 0.8 and 0.4 < share[1] < 0.8
    assert min(share[2:]) > 0.9 and min(share) < 1


def test_sysu_lets_everybody_be_matched():
    """Missing both infrared cameras is rare enough to need many draws."""
    spec = people.TreeSpec("sysu", n_train=5, n_test=5, n_images=1)
    for seed in range(6000):
        passed = people._passes_sysu(replace(spec, seed=seed), 10)
        assert {camera.spectrum for camera in passed} == {"visible", "near-infrared"}


def test_llcm_index_and_folders(trees):
    root = trees["llcm"]
    for kind in ("vis", "nir"):
        entries = lines(root / f"idx/train_{kind}.txt")
        assert sorted(n for n, _ in entries) == images(root, f"train_{kind}/*/*.jpg")
        assert sorted({label for _, label in entries}) == list(range(5))
    text = (root / "idx/test_id.txt").read_text()
    assert [int(word) for word in text.strip().split(",")] == [6, 7, 8, 9]
    cameras = {
        kind: {int(p.name[3:]) for p in (root / f"test_{kind}").iterdir()}
        for kind in ("vis", "nir")
    }
    assert cameras == {"vis": set(range(1, 10)), "nir": set(range(1, 10)) - {3}}
    people_tested = {name.split("/")[2] for name in images(root, "test_*/cam*/*/*.jpg")}
    assert people_tested == {"0006", "0007", "0008", "0009"}


def test_plain_folder(trees):
    root = trees["folder"]
    assert {p.name for p in root.iterdir()} == {"visible", "infrared", "joints.csv", "rendered.json"}
    for name in ("visible", "infrared"):
        folders = sorted(p.name for p in (root / name).iterdir())
        assert folders == [f"{i:04d}" for i in range(1, 10)]
        assert len(images(root, f"{name}/*/*.png")) == 9 * 3


def test_a_tree_needs_an_empty_folder_and_people(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        write_tree("folder", tmp_path, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    for name in ("n_train", "n_test", "n_images"):
        with pytest.raises(ValueError, match=name):
            write_tree("folder", tmp_path / "new", **(SMALL | {name: 0}))


# -- pocket sets ----------------------------------------------------------------------


def remove_an_image(root: Path) -> None:
    next(root.rglob("*.bmp")).unlink()


def flip_a_bit(root: Path) -> None:
    path = next(root.rglob("*.bmp"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swap_two_images(root: Path) -> None:
    first, second = sorted(root.rglob("*.bmp"))[:2]
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other), second.write_bytes(one)


def cut_an_index(root: Path) -> None:
    path = root / "idx/test_thermal_10.txt"
    path.write_text(path.read_text()[:10])


def forget_the_joints(root: Path) -> None:
    (root / "joints.csv").unlink()


def spoil_the_manifest(root: Path) -> None:
    (root / "manifest.json").write_text("{")


DAMAGES = [
    remove_an_image, flip_a_bit, swap_two_images, cut_an_index, forget_the_joints,
    spoil_the_manifest,
]  # fmt: skip


def no_drafts(cache):
    """Whether a cache holds one set and its lock, nothing else."""
    return {p.name.strip(".") for p in cache.iterdir()} == {"tiny", "tiny.lock"}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage_is_repaired_and_said(tiny, tmp_path, capsys, damage):
    root = people.pocket_root(tiny, tmp_path)
    whole = contents(root)
    capsys.readouterr()
    damage(root)
    assert people.pocket_root(tiny, tmp_path) == root
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "damaged" in said
    assert contents(root) == whole
    people.pocket_root(tiny, tmp_path)
    assert capsys.readouterr().out == ""  # nothing left to repair
    assert no_drafts(tmp_path)


@pytest.mark.parametrize("change", [{"seed": 9}, {"difficulty": Difficulty(noise=0.5)}])
def test_a_changed_specification_is_rendered(tiny, tmp_path, monkeypatch, change):
    before = contents(people.pocket_root(tiny, tmp_path))
    monkeypatch.setitem(people.POCKET_SETS, tiny, replace(TINY, **change))
    after = contents(people.pocket_root(tiny, tmp_path))
    assert set(before) == set(after) and before != after


@pytest.mark.parametrize("damage", [shutil.rmtree, remove_an_image])
def test_of_concurrent_callers_one_renders(tiny, tmp_path, monkeypatch, damage):
    root = people.pocket_root(tiny, tmp_path)
    whole = contents(root)
    write_tree, trees = people.write_tree, []
    monkeypatch.setattr(
        people, "write_tree", lambda **k: trees.append(k) or write_tree(**k)
    )
    for time in range(1, 4):
        damage(root)
        failures = []

        def call():
            try:
                people.pocket_root(tiny, tmp_path)
            except Exception as error:
                failures.append(error)

        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert not failures
        assert len(trees) == time
        assert contents(root) == whole
        assert no_drafts(tmp_path)


def test_workers_render_what_one_process_renders(tmp_path):
    """Over 500 images go to two processes; the tree is the same."""
    spec = people.TreeSpec("folder", 126, 1, 2, size=(32, 16))
    shots = people._SHOTS["folder"](spec)
    assert len(shots) > 500
    rows = people._write_shots(shots, tmp_path / "two", spec)
    some = slice(0, None, 37)
    assert rows[some] == people._write_shots(shots[some], tmp_path / "one", spec)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert len(two) == len(shots)
    assert all(two[name] == content for name, content in one.items())


def test_a_script_without_guard_still_renders(tmp_path):
    """Workers cannot start there; the images are written all the same."""
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from afen.people import write_tree\n"
        f"write_tree('folder', {str(tmp_path / 'tree')!r}, n_train=126, n_test=1, "
        "n_images=2, size=(32, 16))\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(images(tmp_path / "tree", "*/*/*.png")) == 127 * 2 * 2


def test_a_script_without_guard_does_not_wait_for_itself(tmp_path):
    """Its workers would wait for the lock that it holds."""
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from pathlib import Path\n"
        "from afen.people import TreeSpec, render_set\n"
        "spec = TreeSpec('folder', 126, 1, 2, size=(32, 16))\n"
        f"render_set(Path({str(tmp_path / 'set')!r}), spec)\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert len(images(tmp_path / "set", "*/*/*.png")) == 127 * 2 * 2
    assert "under if __name__ == '__main__'" in run.stderr


if __name__ == "__main__":
    sheet = people.reference_sheet()
    Image.fromarray(sheet).save(SHEET, optimize=True)
    DIGEST.write_text(digest(sheet) + "\n")
