"""Broken data sets, made one by one: each loads right, or is refused in a sentence.

`BREAKS` holds one function per kind of fault; `broken_trees` draws kinds, layouts and
places from a seed. Nothing may be silently wrong: what is loaded must agree with a second
reading of the tree, and where it is not what the whole tree gave, `verify` must say so.
"""

import shutil
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.io import savemat

from afen.batches import pack
from afen.core import keyed_rng
from afen.datasets import JOINT_COLUMNS, is_image, load, verify
from afen.people import write_tree

SIZE = (24, 12)  # of the packed images
LAYOUTS = ("regdb", "sysu", "llcm", "folder")


@dataclass
class Tree:
    """A copy of a small rendered set, and where chance comes from."""

    layout: str
    root: Path
    rng: np.random.Generator

    def pick(self, values):
        """One of the values by chance."""
        values = sorted(values)
        return values[self.rng.integers(len(values))]

    def images(self):
        return [p for p in self.root.rglob("*") if p.is_file() and is_image(p.name)]

    def image(self):
        return self.pick(self.images())

    def people(self):
        """The folders that hold images."""
        return {p.parent for p in self.images()}

    def index(self):
        """One of the index files that are read under trial 1."""
        every = (self.root / "idx").glob("t*_*.txt")
        return self.pick(p for p in every if "test_id" not in p.name and p.stem[-2:] != "10"
                         and (self.layout != "regdb" or p.stem.endswith("_1")))  # fmt: skip

    def ids(self):
        """One of the files that list people."""
        names = "idx/test_id.*" if self.layout == "llcm" else "exp/*_id.*"
        return self.pick(self.root.glob(names))

    def change_line(self, change):
        """Change one line of an index file."""
        path = self.index()
        lines = path.read_text().splitlines()
        number = self.rng.integers(len(lines))
        lines[number] = change(*lines[number].rsplit(" ", 1))
        path.write_text("\n".join(lines) + "\n")

    def change_lines(self, change):
        """Change all lines of all index files alike."""
        for path in (self.root / "idx").glob("t*_*.txt"):
            if "test_id" not in path.name:
                pairs = [line.rsplit(" ", 1) for line in path.read_text().splitlines()]
                path.write_text("\n".join(change(*pair) for pair in pairs) + "\n")


BREAKS = {}  # name -> (function, layouts)


def breaks(*layouts):
    """Note a kind of fault, for the layouts that can have it."""
    def note(function):
        BREAKS[function.__name__] = function, layouts or LAYOUTS
        return function
    return note  # fmt: skip


LISTED = ("regdb", "llcm")
NUMBERED = ("sysu", "llcm")

# Lines of index files


@breaks(*LISTED)
def a_line_is_gone(t):
    t.change_line(lambda path, label: "")


@breaks(*LISTED)
def a_line_stands_twice(t):
    t.change_line(lambda path, label: f"{path} {label}\n{path} {label}")


@breaks(*LISTED)
def a_label_is_no_number(t):
    t.change_line(lambda path, label: f"{path} {t.pick(['x', '-1', '1.5', '', '1e3', '²'])}")


@breaks(*LISTED)
def a_label_is_huge(t):
    t.change_line(lambda path, label: f"{path} {10**30}")


@breaks(*LISTED)
def a_label_is_anothers(t):
    t.change_line(lambda path, label: f"{path} {int(label) + 1}")


@breaks(*LISTED)
def a_listed_image_is_not_there(t):
    t.change_line(lambda path, label: f"{path}.gone.png {label}")


@breaks(*LISTED)
def a_path_is_spelt_another_way(t):
    spelling = t.pick(["/./", "//", "\\"])
    t.change_line(lambda path, label: f"{path.replace('/', spelling)} {label}")


@breaks(*LISTED)
def a_path_leaves_the_folder(t):
    t.change_line(lambda path, label: f"../{t.root.name}/{path} {label}")


@breaks(*LISTED)
def paths_are_absolute(t):
    t.change_lines(lambda path, label: f"{t.root}/{path} {label}")


@breaks(*LISTED)
def paths_begin_with_the_name_of_the_set(t):
    t.change_lines(lambda path, label: f"RegDB/{path} {label}")


@breaks(*LISTED)
def lines_end_as_on_windows(t):
    path = t.index()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


@breaks(*LISTED)
def lines_have_tabs_and_blank_lines(t):
    t.change_lines(lambda path, label: f"{path}\t{label}\n")


@breaks(*LISTED)
def an_image_is_in_both_lists(t):
    spelling = t.pick(["/", "//", "/./", "\\"])
    names = {"regdb": ["idx/test_visible_1.txt", "idx/test_thermal_1.txt"],
             "llcm": ["idx/train_vis.txt", "idx/train_nir.txt"]}[t.layout]  # fmt: skip
    line = (t.root / names[0]).read_text().splitlines()[0].replace("/", spelling)
    with (t.root / names[1]).open("a") as file:
        file.write(line + "\n")


@breaks("regdb")
def the_test_lists_are_equal(t):
    lists = [t.root / f"idx/test_{kind}_1.txt" for kind in ("visible", "thermal")]
    shutil.copy(*lists)


@breaks("regdb")
def the_lists_are_swapped(t):
    first, second = (t.root / f"idx/train_{kind}_1.txt" for kind in ("visible", "thermal"))
    texts = first.read_text(), second.read_text()
    first.write_text(texts[1])
    second.write_text(texts[0])


@breaks("regdb")
def training_is_the_test(t):
    for kind in ("visible", "thermal"):
        shutil.copy(t.root / f"idx/test_{kind}_1.txt", t.root / f"idx/train_{kind}_1.txt")


@breaks(*LISTED)
def an_index_is_empty(t):
    t.index().write_text("")


@breaks(*LISTED)
def an_index_is_gone(t):
    t.index().unlink()


@breaks(*LISTED)
def an_index_is_cut(t):
    path = t.index()
    content = path.read_bytes()
    path.write_bytes(content[: t.rng.integers(1, len(content) - 1)])


@breaks(*LISTED)
def an_index_is_no_text(t):
    t.index().write_bytes(t.rng.bytes(300))


@breaks(*LISTED)
def an_index_is_utf_16(t):
    path = t.index()
    path.write_bytes(path.read_text().encode("utf-16"))


# Files that list people


def write_ids(t, text):
    path = t.ids()
    path.unlink()
    path.with_suffix(".txt").write_text(text)


@breaks(*NUMBERED)
def a_person_has_thirty_digits(t):
    write_ids(t, f"1,{10**29}")


@breaks(*NUMBERED)
def people_are_no_numbers(t):
    write_ids(t, t.pick(["one,two", "1;2", "-1", "1.5,2", "nan", "\x00"]))


@breaks(*NUMBERED)
def nobody_is_listed(t):
    write_ids(t, "")


@breaks(*NUMBERED)
def somebody_without_images_is_listed(t):
    path = t.ids()
    name, parts = path.name, path.read_text() if path.suffix == ".txt" else ""
    if parts:
        path.write_text(parts.strip() + ",777")
    else:
        path.with_name(name).with_suffix(".txt").write_text("777")


@breaks(*NUMBERED)
def somebody_is_in_training_and_test(t):
    names = ("exp/train_id", "exp/test_id") if t.layout == "sysu" else ("idx/test_id",)
    people = sorted({int(p.name) for p in t.people() if p.name.isdecimal()})
    for name in names:
        for path in t.root.glob(f"{name}.*"):
            path.unlink()
        (t.root / f"{name}.txt").write_text(",".join(map(str, people)))


@breaks(*NUMBERED)
def people_in_a_mat_are_not_numbers(t):
    path = t.ids()
    path.unlink()
    savemat(path.with_suffix(".mat"), {"id": np.array([1.5, np.nan, np.inf])})


@breaks(*NUMBERED)
def a_mat_is_damaged(t):
    path = t.ids()
    path.unlink()
    path.with_suffix(".mat").write_bytes(t.rng.bytes(200))


@breaks("sysu")
def the_draws_have_three_cameras(t):
    cells = np.empty((3, 1), object)
    cells[:] = [[np.ones((10, 4))]] * 3
    savemat(t.root / "exp/rand_perm_cam.mat", {"rand_perm_cam": cells})


@breaks("sysu")
def the_draws_hold_nan(t):
    cells = np.empty((6, 1), object)
    for camera in range(6):
        inner = np.empty((1, 20), object)
        inner[:] = [[np.full((10, 2), np.nan)] * 20]
        cells[camera, 0] = inner
    savemat(t.root / "exp/rand_perm_cam.mat", {"rand_perm_cam": cells})


# Image files


@breaks()
def an_image_is_empty(t):
    t.image().write_bytes(b"")


@breaks()
def an_image_is_cut(t):
    path = t.image()
    content = path.read_bytes()
    path.write_bytes(content[: t.rng.integers(1, len(content) // 2)])


@breaks()
def an_image_is_text(t):
    t.image().write_text("<html>404</html>")


@breaks()
def an_image_is_anothers(t):
    first, second = sorted(t.images())[:: max(1, len(t.images()) - 1)][:2]
    second.write_bytes(first.read_bytes())


@breaks("regdb", "sysu", "llcm")  # a folder of one's own may hold any number
def an_image_is_gone(t):
    t.image().unlink()


@breaks()
def an_image_has_sixteen_bits(t):
    path = t.image()
    deep = Image.fromarray(t.rng.integers(0, 65536, (48, 24), np.uint16))
    deep.save(path, format="png")


@breaks()
def an_image_has_a_capital_suffix(t):
    path = t.image()
    path.rename(path.with_suffix(path.suffix.upper()))


@breaks()
def an_image_has_another_suffix(t):
    path = t.image()
    path.rename(path.with_suffix(t.pick([".txt", ".heic", ".mp4", ""])))


@breaks()
def an_image_is_a_folder(t):
    path = t.image()
    path.unlink()
    path.mkdir()


@breaks()
def an_image_is_a_link_to_nowhere(t):
    path = t.image()
    path.unlink()
    path.symlink_to("nowhere.png")


@breaks()
def an_image_lies_too_deep(t):
    path = t.image()
    (path.parent / "x" / "y").mkdir(parents=True)
    path.rename(path.parent / "x" / "y" / path.name)


@breaks()
def an_image_lies_too_high(t):
    path = t.image()
    path.rename(t.root / path.name)


# Folders


@breaks()
def somebody_is_gone(t):
    shutil.rmtree(t.pick(t.people()))


@breaks()
def somebody_has_no_images(t):
    for path in t.pick(t.people()).iterdir():
        path.unlink()


@breaks()
def somebody_is_a_word(t):
    folder = t.pick(t.people())
    folder.rename(folder.with_name("somebody"))


@breaks()
def somebody_is_numbered_otherwise(t):
    folder = t.pick(p for p in t.people() if p.name.isdecimal())
    name = folder.name.lstrip("0") if folder.name[0] == "0" else "0" + folder.name
    folder.rename(folder.with_name(name))


@breaks()
def a_folder_of_the_root_is_gone(t):
    shutil.rmtree(t.pick(p for p in t.root.iterdir() if p.is_dir()))


@breaks()
def a_folder_of_the_root_has_a_capital(t):
    folder = t.pick(p for p in t.root.iterdir() if p.is_dir())
    folder.rename(folder.with_name(folder.name.swapcase()))


@breaks()
def a_folder_leads_in_a_circle(t):
    (t.pick(t.people()) / "circle").symlink_to(t.root, target_is_directory=True)


@breaks()
def systems_left_their_files(t):
    folder = t.pick(t.people())
    for name in ("Thumbs.db", ".DS_Store", "._001.png", "desktop.ini"):
        (folder / name).write_bytes(b"\x00\x01")


@breaks("folder")
def cameras_stand_above_people(t):
    for modality in ("visible", "infrared"):
        top = t.root / modality
        people = sorted(top.iterdir())
        for camera in ("cam1", "cam2"):
            for person in people:
                shutil.copytree(person, top / camera / person.name)
        for person in people:
            shutil.rmtree(person)


@breaks("folder")
def a_camera_has_no_number(t):
    folder = t.pick(t.people())
    path = sorted(p for p in folder.iterdir() if p.is_file())[0]
    (folder / "garden").mkdir()
    path.rename(folder / "garden" / path.name)


@breaks("folder")
def two_folders_are_one_number(t):
    for modality in ("visible", "infrared"):
        first = sorted((t.root / modality).iterdir())[0]
        shutil.copytree(first, first.with_name("0" + first.name))


# Joints


def change_joints(t, change):
    table = pd.read_csv(t.root / "joints.csv")
    change(table).to_csv(t.root / "joints.csv", index=False)


@breaks()
def joints_lack_a_column(t):
    change_joints(t, lambda table: table.drop(columns=t.pick(JOINT_COLUMNS)))


@breaks()
def joints_name_a_path_twice(t):
    change_joints(t, lambda table: pd.concat([table, table[:1]]))


@breaks()
def joints_are_no_numbers(t):
    def change(table):
        table = table.astype({"x3": object})
        table.loc[t.rng.integers(len(table)), "x3"] = t.pick(["left", "1,5", "-"])
        return table
    change_joints(t, change)  # fmt: skip


@breaks()
def joints_are_infinite(t):
    change_joints(t, lambda table: table.assign(y4=t.pick([np.inf, -np.inf])))


@breaks()
def joints_are_no_table(t):
    path = t.root / "joints.csv"
    path.write_bytes(t.pick([b"", t.rng.bytes(500), b'"', b"path\n\x00"]))


# Trying them


def whole_trees(folder):
    """A small whole tree of each layout."""
    small = {"n_train": 5, "n_test": 5, "n_images": 2, "size": (48, 24)}
    return {layout: write_tree(layout, folder / layout, **small) for layout in LAYOUTS}


def broken_trees(whole, folder, n, seed):
    """n broken copies, each with what was done to it: every kind in turn, by chance."""
    pairs = [(kind, layout) for kind, (_, layouts) in BREAKS.items() for layout in layouts]
    order = [pairs[i] for i in keyed_rng("broken", seed).permutation(len(pairs))]
    for number in range(n):
        kind, layout = order[number % len(order)]
        tree = Tree(layout, folder / "tree", keyed_rng("broken", seed, number))
        shutil.rmtree(tree.root, ignore_errors=True)
        shutil.copytree(whole[layout], tree.root)
        BREAKS[kind][0](tree)
        yield kind, tree


def rows_of(split):
    """Who is on which image, and which half it is in."""
    halves = {"train": split.train, "test": split.test}
    plain = lambda path: "/".join(part.lstrip("0") for part in path.casefold().split("/"))
    return {
        (half, plain(row.path), int(row.identity), row.modality)
        for half, table in halves.items() for row in table.itertuples()
    }  # fmt: skip


def said(layout, root):
    """What `verify` prints of a tree, without the folder's name."""
    return str(verify(layout, root)).replace(str(root), "")


def person(path):
    """The folder of a person in a folder of one's own, with its half if it has one."""
    return path.split("/")[1]


def faults_of(split, root, packed):
    """What is wrong with a loaded split, by a second and simpler reading of the tree."""
    table = pd.concat([split.train, split.test])
    if table.path.duplicated().any():
        yield "an image is in the split twice"
    if set(split.train.identity) & set(split.test.identity):
        yield "somebody is in training and in test"
    if sorted(set(split.train.label)) != [*range(split.train.identity.nunique())]:
        yield "labels have gaps"
    words = {"Visible": "visible", "Thermal": "infrared", "visible": "visible",
             "infrared": "infrared", "cam3": "infrared", "cam6": "infrared",
             "train_vis": "visible", "train_nir": "infrared", "test_vis": "visible",
             "test_nir": "infrared"}  # fmt: skip
    words_for_people = split.name == "folder"  # then they are numbered in their order
    if words_for_people and table.path.map(person).groupby(table.identity).nunique().max() > 1:
        yield "two people are one"
    for row, image in zip(table.itertuples(), packed, strict=True):
        parts = row.path.split("/")
        if words.get(parts[0], "visible") != row.modality:
            yield f"{row.path} is {row.modality}"
        numbers = [int(p) for p in parts[:-1] if p.isdecimal()]
        if not words_for_people and numbers[-1:] != [row.identity]:
            yield f"{row.path} is of {row.identity}"
        with Image.open(root / row.path) as file:
            small = file.convert("RGB").resize(SIZE[::-1], Image.Resampling.LANCZOS)
        if not np.array_equal(np.asarray(small), image):
            yield f"{row.path} has other pixels"
    if set(JOINT_COLUMNS) <= set(table):
        joints = table[JOINT_COLUMNS].dropna()  # images without joints are none
        if not all(isinstance(v, float) and np.isfinite(v) for v in joints.to_numpy().ravel()):
            yield "joints are no numbers"


def is_sentence(error):
    """Whether an error is one that is meant for people: a sentence, or a list of files."""
    kinds = (ValueError, FileNotFoundError, PermissionError)
    first, *others = str(error).splitlines() or [""]
    listed = all(line.startswith("  ") or " under " in line for line in others)
    return type(error) in kinds and 20 < len(first) < 500 and listed and "Traceback" not in first


def outcome(tree, before):
    """"refused", "right" (as before), "said" (other, and verify says so), or a fault."""
    try:
        with warnings.catch_warnings(action="ignore"):
            split = load(tree.layout, tree.root)
        paths = [*split.train.path, *split.test.path]
        packed = pack(split.root, paths, SIZE, tree.root.parent / "packed").images
    except Exception as error:
        return "refused" if is_sentence(error) else f"{type(error).__name__}: {error}"
    if faults := [*faults_of(split, tree.root, packed)]:
        return faults[0]
    rows, words = before[tree.layout]
    if said(tree.layout, tree.root) != words:
        return "said"
    return "right" if rows_of(split) == rows else "other rows, and nothing says so"


def try_trees(folder, n, seed):
    """Break n trees; how each ended, by kind, and the sentences of what went wrong."""
    folder.mkdir(exist_ok=True)
    whole = whole_trees(folder)
    before = {
        layout: (rows_of(load(layout, root)), said(layout, root))
        for layout, root in whole.items()
    }
    ended, faults, kinds, layouts = Counter(), [], {}, Counter()
    for kind, tree in broken_trees(whole, folder / "broken", n, seed):
        end = outcome(tree, before)
        try:
            said(tree.layout, tree.root)
        except Exception as error:
            end = f"verify raises {type(error).__name__}: {error}"
        known = end in ("refused", "right", "said")
        ended[end if known else "wrong"] += 1
        layouts[tree.layout] += 1
        kinds.setdefault(kind, []).append(end)
        if not known:
            place = str(tree.root)
            faults.append(f"{kind} ({tree.layout}): {end}".replace(place, "").split("\n")[0])
    return {
        "trees": n,
        "layouts": dict(layouts),
        "kinds": {kind: dict(Counter(ends)) for kind, ends in sorted(kinds.items())},
        **{word: ended[word] for word in ("refused", "right", "said", "wrong")},
        "faults": faults,
    }
