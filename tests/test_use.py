"""A trained network put to work: retrieval, export, and the command line."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from afen import cli, export, retrieval
from afen.core import digest
from afen.evaluation import cosine_distances
from afen.method import create
from afen.people import write_tree
from afen.records import read_record, run_id, write_record
from afen.retrieval import Gallery, list_crops
from afen.runs import DEFAULTS, carry_out, check_machine, make_plan
from afen.trained import TrainedRun, open_run

ROOT = Path(__file__).resolve().parent.parent
TINY = {"epochs": 1, "steps": 1, "identities": 2, "images": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder of two finished runs, of seeds 0 and 1; their images lie in `tree`."""
    here = tmp_path_factory.mktemp("shelf")
    tree = write_tree("regdb", here / "tree", n_train=4, n_test=3, n_images=2, size=(48, 24))
    for seed in (0, 1):
        given = DEFAULTS | TINY | {"dataset": "regdb", "preset": "pocket", "method": "agw"}
        plan = make_plan(given | {"root": str(tree), "seed": seed})
        carry_out(replace(plan, folder=here / "runs" / plan.folder.name))
    return here / "runs"


@pytest.fixture(scope="module")
def run(shelf):
    return open_run(sorted(shelf.iterdir())[0], "cpu")


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Crops that nobody has labelled, in two flat folders: day and night."""
    here = tmp_path_factory.mktemp("crops")
    tree = write_tree("folder", here / "tree", n_train=4, n_test=4, n_images=1)
    for modality, name in {"visible": "day", "infrared": "night"}.items():
        (here / name).mkdir()
        for i, path in enumerate(sorted((tree / modality).rglob("*.png"))):
            shutil.copy(path, here / name / f"crop {i:02} ä.png")
    return here


@pytest.fixture
def gallery(run, crops, tmp_path):
    return Gallery.from_folder(run, crops / "night", "infrared", tmp_path)


# --- crops of any folder


@pytest.mark.parametrize(
    "paths, given, words",
    [
        (["visible/a.png", "infrared/b/c.jpg"], None, ["infrared", "visible"]),
        (["a.png", "deep/er/b.PNG"], "visible", ["visible", "visible"]),
        (["a.png", "visible/b.png"], "infrared", ["infrared", "visible"]),
        (["cam1/infrared/a.png", "cam2/visible/a.png"], None, ["infrared", "visible"]),
    ],
)
def test_crops_are_listed_at_any_depth(tmp_path, paths, given, words):
    for path in [*paths, "notes.txt"]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert list_crops(tmp_path, given).modality.tolist() == words


def test_a_word_of_ones_own_says_more_than_the_folders_above(tmp_path):
    night = tmp_path / "visible" / "night"
    night.mkdir(parents=True)
    (night / "a.png").touch()
    assert list_crops(night).modality.tolist() == ["visible"]
    assert list_crops(night, "infrared").modality.tolist() == ["infrared"]


def test_a_folder_that_says_nothing_is_refused(tmp_path, crops):
    with pytest.raises(FileNotFoundError, match="no images"):
        list_crops(tmp_path)
    with pytest.raises(ValueError, match="Nothing says whether crop 00 ä.png"):
        list_crops(crops / "day")
    with pytest.raises(ValueError, match='"rgb" is not visible'):
        list_crops(crops / "day", "rgb")


# --- retrieval


def test_the_search_is_the_order_of_the_distances(gallery, crops, run):
    query = crops / "day" / "crop 02 ä.png"
    found = gallery.search(query, k=99)
    assert len(found) == len(gallery) and found["rank"].tolist() == [*range(1, 9)]
    day = Gallery.from_folder(run, crops / "day", "visible", crops)
    row = day.crops.path.tolist().index(query.name)
    distances = cosine_distances(day.features[row : row + 1], gallery.features)[0]
    order = np.argsort(distances)
    assert found.path.tolist() == gallery.crops.path.iloc[order].tolist()
    np.testing.assert_allclose(found.distance, distances[order], atol=1e-5)


def test_blocks_change_nothing_and_ties_keep_their_order(monkeypatch):
    some = torch.nn.functional.normalize(torch.randn(5, 3))
    features = torch.cat([some, some, some])
    whole = retrieval.nearest_rows(some, features, 7)
    monkeypatch.setattr(retrieval, "BLOCK", 4)
    for one, other in zip(whole, retrieval.nearest_rows(some, features, 7)):
        torch.testing.assert_close(one, other)
    assert whole[1][:, :3].tolist() == [[i, i + 5, i + 10] for i in range(5)]


def test_equal_and_near_equal_crops_are_said(run, crops, tmp_path):
    folder = Path(shutil.copytree(crops / "night", tmp_path / "night"))
    first, second = sorted(folder.iterdir())[:2]
    shutil.copy(first, folder / "z equal.png")
    Image.open(second).save(folder / "z near.jpg", quality=80)
    found = Gallery.from_folder(run, folder, "infrared", tmp_path).duplicates()
    assert found.to_numpy().tolist() == [
        [first.name, "z equal.png", "equal"],
        [second.name, "z near.jpg", "near-equal"],
    ]


def test_near_pairs_do_not_hang_on_the_block(crops, run):
    small = retrieval.thumbnails(run.pack(crops / "day", _names(crops / "day"), crops).images)
    twice, words = np.concatenate([small, small]), ["visible"] * 16
    pairs = [(i, i + 8) for i in range(8)]
    for block in (3, 99):
        assert sorted(retrieval.near_pairs(twice, words, block)) == pairs
    assert not [*retrieval.near_pairs(twice, ["visible"] * 8 + ["infrared"] * 8)]


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_query_is_of_the_other_modality_unless_somebody_says_more(gallery, tmp_path):
    assert retrieval.query_modality("a.png", gallery) == "visible"
    assert retrieval.query_modality("infrared/a.png", gallery) == "infrared"
    assert retrieval.query_modality("visible/a.png", gallery, "infrared") == "infrared"


def test_a_saved_gallery_comes_back(gallery, run, crops, tmp_path):
    query = crops / "day" / "crop 00 ä.png"
    again = Gallery.open(gallery.save(tmp_path / "night"), run)
    pd.testing.assert_frame_equal(again.search(query), gallery.search(query))
    assert again.folder == gallery.folder and len(again.duplicates()) == 0


@pytest.mark.parametrize("kind", ["text", "cut", "objects", "missing"])
def test_a_damaged_gallery_is_refused(gallery, run, tmp_path, kind):
    path = gallery.save(tmp_path / "g.npz")
    held = dict(np.load(path))
    if kind == "text":
        path.write_text("no archive")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "objects":  # would run code if it were read
        np.savez(path, **held | {"path": np.array([{"a": 1}], object)})
    else:
        np.savez(path, **{k: v for k, v in held.items() if k != "small"})
    with pytest.raises(ValueError, match="is no saved gallery: make it again"):
        Gallery.open(path, run)


def test_faiss_finds_the_same(gallery, crops):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed: pip install -e '.[faiss]'")
    exact = retrieval.nearest_rows(gallery.features, gallery.features, 3)
    cosines, rows = retrieval.faiss_index(gallery).search(gallery.features.numpy(), 3)
    assert rows.tolist() == exact[1].tolist()
    np.testing.assert_allclose(cosines, exact[0], atol=1e-5)


# --- export


def untrained(method):
    """A run of random weights that was never trained."""
    given = DEFAULTS | {"method": method, "device": "cpu"}
    plan = make_plan(given)
    recipe = replace(plan.recipe, weights="none")
    torch.manual_seed(0)
    network = create(method, 4, recipe, **plan.options).eval()
    record = {"id": f"untrained-{method}", "status": "smoke", "code": {"revision": "none"}}
    return TrainedRun(record | {"data": {"name": "none"}}, plan, network, torch.device("cpu"))


def pixels(folder, n):
    """The first crops of a folder, [n, 3, 64, 32] uint8."""
    images = [Image.open(path).resize((32, 64)) for path in sorted(folder.iterdir())[:n]]
    stack = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return np.ascontiguousarray(stack.transpose(0, 3, 1, 2))


def expected(run, images, modality):
    """What the run's own `embed` gives."""
    rows = retrieval.Pixels(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
    return run.embed(rows, pd.Series([modality] * len(images)))


@pytest.mark.parametrize("method, modality", [("ddag", "visible"), ("pmt", "infrared")])
def test_a_program_gives_the_same_features_for_any_number_of_crops(crops, method, modality):
    run = untrained(method)
    made = export.program(run, modality).module()
    for n in (1, 5):
        images = pixels(crops / "day", n)
        with torch.no_grad():
            found = made(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(found, expected(run, images, modality), atol=1e-5)


def test_an_onnx_file_gives_the_same_and_tells_people_apart(crops, tmp_path):
    pytest.importorskip("onnxscript", reason="ONNX is not installed: pip install -e '.[export]'")
    run, images = untrained("xmodal"), pixels(crops / "night", 8)
    path = export.write_onnx(run, "infrared", tmp_path / "infrared.onnx")
    file = export.open_export(path)
    assert file.about == export.describe(run, "infrared")
    want = expected(run, images, "infrared")
    assert export.check_export(path, images, want)["difference"] < 1e-5
    np.testing.assert_allclose(file.embed(images[:1]), want[:1], atol=1e-5)
    one = np.repeat(want[:1], 8, axis=0)
    assert export.spread(want) > 1e-3 > export.spread(one)
    with pytest.raises(ValueError, match="departs from torch"):
        export.check_export(path, images, one)


def test_without_onnx_a_sentence_says_what_to_install(monkeypatch, tmp_path, run):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"needs the package onnxscript: pip install -e '.\[exp"):
        export.export_run(run, tmp_path, "onnx")
    assert not list(tmp_path.iterdir())


# --- the command line


def call(capsys, *words):
    """A command's exit code, and what it printed on both streams."""
    code = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_help_is_there_without_torch():
    words = "import sys, afen.cli as c; c.make_parser().format_help()"
    words += "; print([m for m in ('torch', 'pandas', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_has_help_and_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    example = re.search(r"Example:\n  afen (.+)", text)[1].split()
    assert end.value.code == 0 and cli.make_parser().parse_args(example).command == command


def test_without_a_command_the_page_is_printed(capsys):
    code, page, _ = call(capsys)
    assert code == 0 and all(f"  {name} " in page for name in cli.COMMANDS)


def test_a_run_is_found_by_folder_id_and_beginning(shelf):
    one, two = sorted(p.name for p in shelf.iterdir())
    assert cli.find_run(shelf / one) == cli.find_run(one, shelf) == shelf / one
    assert cli.find_run(two[:-6], shelf) == shelf / two
    with pytest.raises(LookupError, match="may be any of 2"):
        cli.find_run("regdb-agw", shelf)
    with pytest.raises(LookupError, match="There is no run 'sysu'.*2 runs in"):
        cli.find_run("sysu", shelf)


def test_all_runs_are_listed_damaged_ones_too(shelf, tmp_path, capsys):
    folder = Path(shutil.copytree(shelf, tmp_path / "runs"))
    (folder / "broken").mkdir()
    (folder / "broken" / "record.json").write_text("{}")
    table = cli.runs_table(folder)
    assert len(table) == 1 + 2 * 2 and table.status.tolist() == ["damaged"] + ["smoke"] * 4
    recorded = open_run(sorted(shelf.iterdir())[0], "cpu").record["scores"]
    want = [100 * recorded[s]["mean"]["mAP"] for s in table.setting[1:3]]
    np.testing.assert_allclose(table.mAP[1:3].astype(float), want)
    code, text, _ = call(capsys, "runs", folder)
    assert code == 0 and text.count("regdb-agw-pocket") == 2


def test_two_runs_are_compared(shelf, capsys):
    one, two = sorted(shelf.iterdir())
    code, text, _ = call(capsys, "compare", one, two)
    assert code == 0 and re.search(r"\nseed +0 +1\n", text) and "infrared-to-visible" in text
    code, text, _ = call(capsys, "compare", one, one)
    assert "nothing that is recorded" in text


def test_trials_are_paired_on_the_same_images_and_galleries_only():
    def record(values, images, gallery="random", split=1, **sizes):
        each = [{"rank1": v} for v in values]
        entry = {"mean": {"rank1": np.mean(values)}, "each": each, "n": len(values)}
        entry |= {"n_queries": 20, "n_gallery": 10} | sizes
        parameters = {"split": split, "gallery": gallery}
        return {
            "data": {"hash": images}, "parameters": parameters, "scores": {"all-single": entry}
        }  # fmt: skip

    one, two = record([0.1, 0.2, 0.3, 0.4], "a"), record([0.2, 0.3, 0.4, 0.5], "a")
    row = cli.paired_scores(one, two).iloc[0]
    assert row.trials == 4 and abs(row["std"]) < 1e-9
    np.testing.assert_allclose([row.difference, row.low, row.high], 10)
    others = [record([0.5] * 4, "b"), record([0.5] * 3, "a")]
    for change in ({"gallery": "official"}, {"split": 2}, {"n_gallery": 9}, {"n_queries": 9}):
        others.append(record([0.5] * 4, "a", **change))
    for other in others:
        row = cli.paired_scores(one, other).iloc[0]
        assert "trials" not in row and row.difference == pytest.approx(25)


def test_runs_on_other_galleries_are_compared_unpaired(shelf, tmp_path, capsys):
    one, two = sorted(shelf.iterdir())
    record = read_record(two / "record.json")
    record["parameters"] |= {"gallery": "official"}
    record["id"] = run_id(record["parameters"])
    record["parameters_hash"] = digest(record["parameters"])
    write_record(record, tmp_path)
    _, text, _ = call(capsys, "compare", one, two)
    assert "trials" in text and "not paired" not in text
    code, text, _ = call(capsys, "compare", one, tmp_path)
    assert code == 0 and "images or galleries are not the same ones" in text


def test_a_copy_is_verified_and_the_exit_code_says_it(shelf, tmp_path, capsys):
    tree = shelf.parent / "tree"
    code, text, _ = call(capsys, "verify", "pocket-regdb", tree)
    assert code == 0 and text.rstrip().endswith("complete")
    damaged = Path(shutil.copytree(tree, tmp_path / "damaged"))
    (damaged / "idx" / "test_thermal_2.txt").unlink()
    code, text, _ = call(capsys, "verify", "pocket-regdb", damaged)
    assert code == 1 and "not complete" in text


def test_features_of_crops_are_written(shelf, crops, tmp_path, capsys):
    run, out = sorted(shelf.iterdir())[0], tmp_path / "day.npz"
    words = ("embed", run, crops / "day", "--modality", "visible", "-o", out, "--device", "cpu")
    code, text, _ = call(capsys, *words)
    with np.load(out, allow_pickle=False) as file:
        assert file["features"].shape == (8, 128) and file["path"].tolist() == _names(crops / "day")
        assert set(file["modality"]) == {"visible"} and str(file["run"]) == run.name
        np.testing.assert_allclose(np.linalg.norm(file["features"], axis=1), 1, atol=1e-5)
    assert code == 0 and "(8, 128) of 8 visible images" in text
    query = next((crops / "night").iterdir())
    words = ("search", run, query, "--gallery", out, "-k", 2, "-o", tmp_path / "q.v1")
    code, text, _ = call(capsys, *words, "--device", "cpu")
    assert code == 0 and f"{tmp_path / 'q.v1.csv'}, {tmp_path / 'q.v1.png'}" in text


def test_a_search_leaves_lines_a_table_and_a_picture(shelf, crops, tmp_path, capsys, gallery):
    run, queries = sorted(shelf.iterdir())[0], sorted((crops / "day").iterdir())[:2]
    saved = gallery.save(tmp_path / "night.npz")
    places = {"folder": (crops / "night", "--modality", "infrared"), "file": (saved,)}
    places["capitals"] = (shutil.copy(saved, tmp_path / "night.NPZ"),)
    tables = []
    for name, place in places.items():
        words = ("search", run, *queries, "--gallery", *place, "-k", 3, "-o", tmp_path / name)
        code, text, _ = call(capsys, *words, "--device", "cpu")
        assert code == 0 and len(re.findall(r"^.*crop \d\d ä.png: crop", text, re.M)) == 2
        tables.append(pd.read_csv(tmp_path / f"{name}.csv"))
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 200
    for table in tables[1:]:
        pd.testing.assert_frame_equal(tables[0], table)
    assert tables[0]["query"].unique().tolist() == [str(query) for query in queries]
    assert tables[0]["rank"].tolist() == [1, 2, 3] * 2


def test_a_network_is_exported_and_checked(shelf, tmp_path, capsys):
    run = sorted(shelf.iterdir())[0]
    code, text, _ = call(capsys, "export", run, "--pt2", "-o", tmp_path / "out")
    assert code == 0 and text.count("departs from torch by") == 2
    about = export.open_export(tmp_path / "out" / "infrared.pt2").about
    assert (about["run"], about["modality"]) == (run.name, "infrared")


@pytest.mark.parametrize("options, kinds", [
    ([], ["onnx"]), (["--onnx"], ["onnx"]), (["--pt2"], ["pt2"]),
    (["--pt2", "--onnx"], ["onnx", "pt2"]),
])  # fmt: skip
def test_every_kind_of_file_that_is_asked_for_is_written(
    shelf, tmp_path, capsys, monkeypatch, options, kinds
):
    asked = []
    monkeypatch.setattr(export, "export_run", lambda *given: asked.append(given[2]) or [])
    code, _, _ = call(capsys, "export", sorted(shelf.iterdir())[0], *options, "-o", tmp_path)
    assert code == 0 and asked == kinds


@pytest.mark.parametrize("ending", ["", ".csv", ".png"])
def test_a_folder_in_the_place_of_a_file_is_said_before_the_work(
    shelf, crops, tmp_path, capsys, monkeypatch, ending
):
    monkeypatch.setattr(cli, "_open", None)  # nothing is opened
    run, out = sorted(shelf.iterdir())[0], tmp_path / "found"
    (tmp_path / f"found{ending or '.npz'}").mkdir()
    words = ("search", run, "q.png", "--gallery", crops) if ending else ("embed", run, crops)
    code, _, error = call(capsys, *words, "-o", out)
    assert code == 2 and f"There is a folder {tmp_path}" in error


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["verify", "regbd"], "did you mean 'regdb'"),
        (["runs", "{here}"], "There are no runs in"),
        (["compare", "nobody", "nobody"], "There is no run 'nobody'"),
        (["embed", "{run}", "{here}", "-o", "{here}/f.npz"], "There are no images in"),
        (["embed", "{run}", "{day}", "-o", "{here}/f.npz"], "Nothing says whether"),
        (["embed", "{run}", "{day}", "--modality", "thermal", "-o", "f"], '"thermal" is not'),
        (["search", "{run}", "no.png", "--gallery", "{day}", "--modality", "visible",
          "-o", "{here}/s"], "There is no image no.png"),
        (["search", "{run}", "no.png", "--gallery", "{here}/g.npz"], "There is no gallery"),
        (["embed", "{run}", "{day}", "-o", "f", "--device", "tpu"], "Unknown device 'tpu'"),
        (["embed", "{run}", "{here}", "-o", "{run}/record.json/f"], "record.json cannot be wr"),
        (["search", "{run}", "no.png", "--gallery", "{here}", "-o", "{run}/record.json/f"],
         "record.json cannot be written (Not a directory): use another -o."),
        (["convert", "{here}/nothing.t"], "nothing.t does not exist"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_one_sentence(
    shelf, crops, tmp_path, capsys, words, sentence
):
    names = {"run": sorted(shelf.iterdir())[0], "here": tmp_path, "day": crops / "day"}
    code, out, error = call(capsys, *(word.format(**names) for word in words))
    assert code == 2 and sentence in error and "Traceback" not in error
    assert error.startswith(f"afen {words[0]}: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_command_is_installed_under_its_name():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"afen": "afen.cli:main"}
    export_needs = project["optional-dependencies"]["export"]
    assert set(export_needs) <= set(project["optional-dependencies"]["dev"])
    pins = (ROOT / "constraints.txt").read_text()
    for extra in ("export", "tensorboard", "faiss"):
        for need in project["optional-dependencies"][extra]:
            assert f"\n{need.partition('>')[0]}==" in pins


# --- TensorBoard


def test_tensorboard_gets_each_epoch_and_changes_no_name(shelf, tmp_path):
    pytest.importorskip(
        "tensorboard", reason="TensorBoard is not installed: pip install -e '.[tensorboard]'"
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = DEFAULTS | TINY | {"dataset": "regdb", "preset": "pocket", "method": "agw"}
    given |= {"root": str(shelf.parent / "tree"), "epochs": 2, "out": str(tmp_path)}
    plan = make_plan(given | {"log": "tensorboard"})
    assert plan.parameters == make_plan(given).parameters
    carry_out(plan)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = pd.DataFrame(open_run(tmp_path, "cpu").record["history"])
    for name in rows.columns.drop("epoch"):
        curve = [(event.step, event.value) for event in events.Scalars(name)]
        np.testing.assert_allclose(curve, rows[["epoch", name]], rtol=1e-5)


def test_without_tensorboard_the_run_does_not_begin(shelf, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    plan = make_plan(DEFAULTS | {"device": "cpu", "log": "tensorboard", "out": str(tmp_path)})
    with pytest.raises(ValueError, match=r"TensorBoard is not installed: pip install -e"):
        check_machine(plan)
