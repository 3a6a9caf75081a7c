"""Trust: what must not pass unnoticed, and what must not be lost."""

import ast
import os
import pty
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
import torchvision
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from afen import batches, figures, probes, runs, training
from afen.backbone import DEPTHS, count_parameters, load_resnet
from afen.batches import equal_rows
from afen.core import digest, started_by
from afen.datasets import JOINT_COLUMNS, load, summary, verify
from afen.method import create, method_class, method_names
from afen.people import write_tree
from afen.records import read_record
from afen.tables import sortable
from afen.trained import initial_network, open_run
from afen.training import load_checkpoint, path_before, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
GIVEN = "print(sorted(injected_parameters(globals(), before, ['epochs'])), started_by())"


def little_notebook(path, *cells):
    """A notebook with a parameters cell, and then the given cells."""
    start = "from afen.core import started_by\nfrom afen.runs import injected_parameters\n"
    cells = [start + "before = set(globals())", "epochs = 1", *cells]
    book = new_notebook(cells=[new_code_cell(cell) for cell in cells], metadata=KERNEL)
    book.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(book, path)
    return book


def last_output(book):
    return book.cells[-1].outputs[-1]["text"]


def test_an_unknown_parameter_is_seen_when_python_starts_papermill(tmp_path):
    little_notebook(tmp_path / "in.ipynb", GIVEN)
    paths = tmp_path / "in.ipynb", tmp_path / "out.ipynb"
    book = papermill.execute_notebook(*paths, {"epoch": 3}, progress_bar=False)
    assert last_output(book).startswith("['epoch', 'epochs'] papermill, started by ")


def test_an_unknown_parameter_is_seen_when_python_runs_papermill_unbuffered(tmp_path):
    little_notebook(tmp_path / "in.ipynb", GIVEN)
    paths = tmp_path / "in.ipynb", tmp_path / "out.ipynb"
    command = [sys.executable, "-u", "-m", "papermill", *paths, "-p", "epoch", "3"]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    said = last_output(nbformat.read(paths[1], as_version=4))
    assert said.startswith(f"['epoch', 'epochs'] papermill {paths[0]} {paths[1]} -p epoch")


def test_a_misspelt_parameter_stops_training_that_python_starts(tmp_path):
    given = {"epoch": 3, "out": str(tmp_path / "run")}
    paths = ROOT / "nbs" / "train.ipynb", tmp_path / "out.ipynb"
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'epochs'"):
        papermill.execute_notebook(*paths, given, progress_bar=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_drawn_on_a_terminal_and_lines_are_written_elsewhere(tmp_path, terminal):
    fit = (
        "from afen.training import progress_bar\n"
        "with progress_bar(4, 0) as bar:\n"
        "    for epoch in range(2):\n"
        "        bar.update(2)\n"
        "        bar.set_postfix(epoch=epoch, loss='1.5', refresh=False)\n"
    )
    little_notebook(tmp_path / "in.ipynb", fit)
    command = [Path(sys.executable).with_name("papermill"), "--no-progress-bar"]
    stdout = pty.openpty()[1] if terminal else subprocess.DEVNULL
    quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    quiet["env"] = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    paths = tmp_path / "in.ipynb", tmp_path / "out.ipynb"  # ipykernel minds pytest's variable
    subprocess.run([*command, *paths], check=True, stdout=stdout, **quiet)
    outputs = nbformat.read(paths[1], as_version=4).cells[-1].outputs
    said = "".join(output["text"] for output in outputs)
    lines = said.strip().splitlines()
    assert ("\r" in said and "|" in said) == terminal
    if not terminal:
        assert [re.sub(r"\[.*,", "[", line) for line in lines] == [
            "2/4 steps [ loss=1.5]", "4/4 steps [ loss=1.5]"
        ]  # fmt: skip


def test_ones_own_variables_are_left_alone_in_a_live_kernel(tmp_path):
    mine = ["epoch = 3", "epochs = 1", "# Parameters of mine\nnotes = 1"]
    book = little_notebook(tmp_path / "in.ipynb", *mine, GIVEN, GIVEN)
    NotebookClient(book).execute()
    assert last_output(book).startswith("['epochs'] a kernel, started by ")


def test_a_program_is_named_without_its_options():
    assert started_by() == Path(sys.argv[0]).name


def flip_a_bit(path, place=None):
    """Change the lowest bit of a byte, of the middle one if none is named."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


def is_one_sentence(error):
    return "\n" not in str(error) and str(error).count(". ") <= 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A plan of three epochs of one step on a few rendered people, and its data."""
    root = tmp_path_factory.mktemp("tiny") / "regdb"
    write_tree("regdb", root, n_train=4, n_test=3, n_images=2, size=(48, 24))
    given = {"dataset": "regdb", "root": str(root), "preset": "pocket", "method": "agw"}
    given |= {"epochs": 3, "steps": 1, "identities": 2, "images": 2, "device": "cpu"}
    plan = runs.make_plan(runs.DEFAULTS | given | {"precision": "float32"})
    return plan, runs.open_data(plan)


def in_folder(tiny, folder, **given):
    """The same plan in another folder, maybe with other parameters."""
    plan, data = tiny
    return runs.make_plan(plan.given | {"out": str(folder)} | given), data


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The folder of the tiny run, finished; copy it before changing it."""
    plan, _ = in_folder(tiny, tmp_path_factory.mktemp("finished") / "run")
    runs.carry_out(plan)
    return plan.folder


# Checkpoints


def test_any_flipped_bit_of_a_checkpoint_is_noticed(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    for epoch in (1, 2):
        save_checkpoint(path, key="a", epoch=epoch, weights=torch.arange(100.0))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(len(whole), size=40):
        flip_a_bit(path, place)
        state = load_checkpoint(path, "a")
        assert state["epoch"] == 1 and "the one before is used" in state["warnings"][0]
        path.write_bytes(whole)
    assert load_checkpoint(path, "a")["epoch"] == 2
    assert "checkpoint.pt is damaged or gone" in capsys.readouterr().out
    path.unlink()  # as a run that is killed between two renames leaves it
    assert load_checkpoint(path, "a")["epoch"] == 1
    flip_a_bit(path_before(path))
    with pytest.raises(ValueError, match="is damaged: delete it") as caught:
        load_checkpoint(path, "a")
    assert is_one_sentence(caught.value)


def stopped(tiny, folder, epochs, **given):
    """The tiny run, stopped at the beginning of an epoch."""
    plan, data = in_folder(tiny, folder, **given)
    run = runs.start(plan, data)

    def begin_epoch(epoch, sweep):
        if epoch == epochs:
            raise KeyboardInterrupt

    run.method.begin_epoch = begin_epoch
    with pytest.raises(KeyboardInterrupt):
        run.fit(progress=False)
    return plan, data


def test_a_run_goes_on_from_the_epoch_before_a_damaged_checkpoint(tiny, tmp_path):
    plan, data = stopped(tiny, tmp_path / "stopped", epochs=2)
    flip_a_bit(plan.folder / "checkpoint.pt")
    again, whole = runs.start(plan, data), runs.start(*in_folder(tiny, tmp_path / "whole"))
    assert again.epoch == 1 and "is damaged or gone" in again.warnings[0]
    for run in (again, whole):
        run.fit(progress=False)
    for name, value in whole.method.state_dict().items():
        assert torch.equal(value, again.method.state_dict()[name])


def test_other_circumstances_since_are_said(tiny, tmp_path, monkeypatch):
    plan, data = stopped(tiny, tmp_path / "run", epochs=1)
    now = training.circumstances(torch.device("cpu"), compiled=False)
    others = {"code": "01234567", "torch": "9.9", "device": "cuda: H200", "compile": "True"}
    others |= {"threads": "64", "processes": "8"}
    assert [*now] == [*others]
    monkeypatch.setattr(training, "circumstances", lambda *_: others)
    run = runs.start(plan, data)
    for (name, value), words in zip(now.items(), run.warnings, strict=True):
        assert f"{name} was {value} and is {others[name]} since" in words


@pytest.mark.parametrize("changed, seconds", [({}, 1.5), ({"device": "cuda: H200"}, 9.0)])
def test_a_step_is_timed_again_on_another_device(
    tiny, tmp_path, monkeypatch, changed, seconds, capsys
):
    monkeypatch.setattr(training, "seconds_per_step", lambda *_: 1.5)
    plan, data = stopped(tiny, tmp_path / "run", epochs=1)
    now = training.circumstances(torch.device("cpu"), compiled=False)
    monkeypatch.setattr(training, "circumstances", lambda *_: now | changed)
    monkeypatch.setattr(training, "seconds_per_step", lambda *_: 9.0)
    run = runs.start(plan, data)
    assert run.seconds == seconds and len(run.warnings) == len(changed)
    assert f"x {seconds:.2f} s" in capsys.readouterr().out


def test_a_checkpoint_from_before_devices_were_noted_goes_on_in_silence(tiny, tmp_path):
    plan, data = stopped(tiny, tmp_path / "run", epochs=1)
    path = plan.folder / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    for name in ("device", "compile"):
        del state["circumstances"][name]
    save_checkpoint(path, **state)
    run = runs.start(plan, data)
    assert run.epoch == 1 and not run.warnings
    assert run.circumstances == training.circumstances(torch.device("cpu"), compiled=False)


def test_a_checkpoint_of_another_network_names_the_first_difference(tiny, tmp_path):
    plan, data = stopped(tiny, tmp_path / "run", epochs=1)
    path = plan.folder / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    name = next(iter(state["method"]))
    del state["method"][name]
    save_checkpoint(path, **state)
    with pytest.raises(ValueError, match=f"network: {name} is missing"):
        runs.start(plan, data)


def test_drafts_of_killed_runs_are_removed(tiny, tmp_path):
    plan, data = in_folder(tiny, tmp_path / "run")
    drafts = [".checkpoint.afen-0123abcd.pt", "figures/.smoke_cmc.afen-89abcdef.svg"]
    kept = [".notes", ".mine.txt", ".backup.20240131"]
    for name in drafts + kept:
        path = plan.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
        os.utime(path, (0, 0))
    runs.begin_record(plan, data)
    left = {p.relative_to(plan.folder).as_posix() for p in plan.folder.rglob(".*")}
    assert left == set(kept)


# Finished runs


def test_a_finished_run_is_opened_and_not_trained(tiny, finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    plan, data = in_folder(tiny, folder)
    run = runs.start(plan, data)
    said = capsys.readouterr().out
    assert "This run is finished" in said and "-p resume False trains it again" in said
    assert runs.record_line(read_record(folder / "record.json")) in said
    assert len(run.fit(progress=False)) == 3
    runs.carry_out(plan)
    assert {p: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    assert runs.start(*in_folder(tiny, folder, resume=False)).epoch == 0


@pytest.mark.parametrize("device, why", [
    (None, "other code or torch?"),
    ("cuda: H200", "it was made on cuda: H200, float32, and this is cpu: "),
])  # fmt: skip
def test_other_scores_of_a_finished_run_are_put_down_to_its_device(
    tiny, finished, tmp_path, capsys, device, why
):
    plan, data = in_folder(tiny, shutil.copytree(finished, tmp_path / "run"))
    record, run = runs.begin_record(plan, data), runs.start(plan, data)
    record["machine"]["device"] = device or record["machine"]["device"]
    for entry in record["scores"].values():
        entry["mean"]["mAP"] += 0.1
    capsys.readouterr()
    runs.end_record(record, plan, data, run, runs.score(plan, data, run)[1])
    assert f"it differs from its record: {why}" in capsys.readouterr().out


def test_to_open_a_finished_run_no_step_is_taken(tiny, finished, tmp_path, monkeypatch):
    """It may lie on a machine that is too small to train it, or without its start weights."""
    plan, data = in_folder(tiny, shutil.copytree(finished, tmp_path / "run"))

    def stop(*_, **__):
        raise AssertionError("a step was taken")

    monkeypatch.setattr(training, "seconds_per_step", stop)
    far = replace(plan.recipe, weights="imagenet")
    monkeypatch.setattr("afen.backbone._load_imagenet", stop)
    assert runs.start(replace(plan, recipe=far), data).epoch == plan.recipe.epochs


def test_a_retraining_that_was_killed_goes_on(tiny, finished, tmp_path):
    """Its checkpoint is worth more than the record that it was to replace."""
    folder = shutil.copytree(finished, tmp_path / "run")
    stopped(tiny, folder, 2, resume=False)
    plan, data = in_folder(tiny, folder)
    assert runs.start(plan, data).epoch == 2
    runs.carry_out(plan)
    assert not list(folder.glob("checkpoint*"))
    assert runs.start(plan, data).epoch == plan.recipe.epochs


def test_the_checkpoint_of_another_training_hides_no_finished_run(tiny, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    other, _ = stopped(tiny, tmp_path / "other", 2, seed=1)
    shutil.copy(other.folder / "checkpoint.pt", folder)
    plan, data = in_folder(tiny, folder)
    assert runs.start(plan, data).epoch == plan.recipe.epochs


def test_damaged_weights_of_a_finished_run_are_not_used(tiny, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    flip_a_bit(folder / "weights.safetensors")
    with pytest.raises(ValueError, match="-p resume False trains it again"):
        runs.start(*in_folder(tiny, folder))


def test_equal_runs_leave_equal_weights_that_others_may_read(tiny, finished, tmp_path):
    plan, _ = in_folder(tiny, tmp_path / "run")
    runs.carry_out(plan)
    files = [folder / "weights.safetensors" for folder in (finished, plan.folder)]
    assert files[0].read_bytes() == files[1].read_bytes()
    probe = tmp_path / "probe"
    probe.write_text("")
    assert stat.S_IMODE(files[1].stat().st_mode) == stat.S_IMODE(probe.stat().st_mode)


def test_more_epochs_in_the_folder_of_a_run_are_refused_with_the_reason(
    tiny, finished, tmp_path
):
    folder = shutil.copytree(finished, tmp_path / "run")
    plan, _ = in_folder(tiny, folder, epochs=6)
    with pytest.raises(ValueError, match="over 3 epochs .* cannot go on from there"):
        runs.check_machine(plan)


# What decides a run


def test_other_joints_are_other_data(tiny):
    plan, data = tiny
    joints = dict.fromkeys(JOINT_COLUMNS, 0.5)
    train = data.split.train.drop(columns=JOINT_COLUMNS, errors="ignore").assign(**joints)
    first, second = (
        replace(data, split=replace(data.split, train=table))
        for table in (train, train.assign(x3=0.25))
    )
    record = {"data": first.describe(runs.data_key(first))}
    assert not runs.changed_data(record, first) and runs.changed_data(record, second)
    assert not runs.other_images(record, second)


def test_start_weights_are_known_by_content_and_named_in_the_record(tiny, tmp_path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "a.pt")
    plan, data = in_folder(tiny, tmp_path / "run", weights=str(tmp_path / "a.pt"))
    moved = shutil.move(tmp_path / "a.pt", tmp_path / "b.pt")
    again, _ = in_folder(tiny, tmp_path / "run", weights=str(moved))
    assert plan.parameters == again.parameters
    record = runs.begin_record(again, data)
    assert record["start_weights"] == {"file": "b.pt", "hash": again.weights_hash}
    assert record["parameters"]["recipe"]["weights"] == f"file:{again.weights_hash}"


def test_paths_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.pt").write_bytes(b"some weights")
    given = {"weights": "~/a.pt", "out": "~/run", "device": "cpu"}
    plan = runs.make_plan(runs.DEFAULTS | given)
    assert plan.recipe.weights == str(tmp_path / "a.pt")
    assert plan.folder == tmp_path / "run"


# Equal images, and queries without a match


def real(folder, name, method="agw", **given):
    """A plan on a small tree without the renderer's mark, and the tree."""
    size = {"n_train": 4, "n_test": 4, "n_images": 2, "size": (48, 24)}
    root = write_tree(name, folder / name, **size)
    (root / "rendered.json").unlink()
    given |= {"dataset": name, "root": str(root), "method": method, "preset": "pocket"}
    quick = {"epochs": 1, "steps": 1, "identities": 2, "images": 2, "device": "cpu"}
    quick["out"] = str(folder / "run")
    return runs.make_plan(runs.DEFAULTS | given | quick), root


EQUAL = {  # from where to where, and what is then counted
    "people": ("visible", 0, "visible", 1, {"two people"}),
    "modalities": ("visible", 0, "infrared", 0, {"both modalities"}),
    "halves": ("visible", 0, "visible", -1, {"two people", "training and test"}),
    "a double": ("visible", 0, "visible", 0, set()),
}


@pytest.mark.parametrize("case", EQUAL)
def test_equal_images_are_said_before_training_and_recorded(tmp_path, capsys, case):
    of, person, to, other, kinds = EQUAL[case]
    plan, root = real(tmp_path, "regdb")
    split = load("regdb", root)
    tables = {m: pd.concat([split.train, split.test]).query("modality == @m") for m in (of, to)}
    people = split.train.identity.unique().tolist() + split.test.identity.unique().tolist()
    paths = [  # the first image of the one, and the last of the other
        root / tables[m].query("identity == @who").path.iloc[place]
        for m, who, place in ((of, people[person], 0), (to, people[other], -1))
    ]
    shutil.copy(*paths)
    data = runs.open_data(plan)
    lines = [line for line in capsys.readouterr().out.splitlines() if "equal images" in line]
    pair = " = ".join(sorted((str(p.relative_to(root)) for p in paths), key=str.casefold))
    assert {re.match(r"warning: equal images (of|in) (.+): 1 \(", s)[2] for s in lines} == kinds
    both = [set(re.search(r"\((.+) = (.+)\)", line).groups()) for line in lines]
    assert both == [set(pair.split(" = "))] * len(kinds)
    assert [f"warning: {words}" for words in data.departures if "equal" in words] == lines


def test_equal_images_make_a_run_partial_and_are_its_reason(tmp_path, capsys):
    plan, root = real(tmp_path, "folder")
    faces = sorted((root / "visible").rglob("*.png"))
    shutil.copy(faces[0], faces[-1])
    runs.carry_out(plan)
    record = read_record(plan.folder / "record.json")
    assert record["status"] == "partial" and "equal images of two people: 1" in record["reason"]
    said = capsys.readouterr().out
    assert said.index("warning: equal images of two people: 1") < said.index("memory of a step")


def test_only_images_that_agree_in_a_line_are_read_whole(monkeypatch):
    images = np.zeros((2000, 16, 8, 3), np.uint8)
    images[:, 8] = np.random.default_rng(0).integers(0, 256, (2000, 8, 3))
    images[7], images[9, 8] = images[1999], images[8, 8]
    images[9, 0] = 1  # equal in the line that is compared, and not elsewhere
    whole = []
    monkeypatch.setattr(batches, "digest", lambda image: whole.append(image) or digest(image))
    digests = equal_rows(SimpleNamespace(images=images))
    assert len(whole) == 4  # 7 and 1999, 8 and 9
    assert np.flatnonzero(digests != "").tolist() == [7, 1999]


@pytest.mark.parametrize("name", ["sysu", "llcm", "regdb"])
def test_queries_without_a_match_are_said_counted_and_no_departure(tmp_path, capsys, name):
    plan, root = real(tmp_path, name)
    if name == "llcm":  # a person is left with one camera
        for folder in [*root.glob("test_vis/cam*"), *root.glob("test_nir/cam*")][1:]:
            person = sorted(p.name for p in root.glob("test_*/cam*/*"))[0]
            shutil.rmtree(folder / person, ignore_errors=True)
    if name == "regdb":
        lists = root / "idx" / "test_thermal_1.txt"
        lists.write_text("".join(lists.read_text().splitlines(keepends=True)[2:]))
    data = runs.open_data(plan)
    dropped = {k: n for k, n in data.describe("")["queries_without_match"].items() if n}
    assert dropped
    said = capsys.readouterr().out
    words = ", ".join(f"{n} of " + "{}" + f" in {s}" for s, n in dropped.items())
    line = "Queries without a match, which the protocol leaves out: "
    assert (line in said) == (name != "regdb")
    departs = [d for d in data.departures if d.startswith("queries without a match")]
    assert len(departs) == (name == "regdb")
    if name != "regdb":
        sizes = {t.setting: len(t.query) for t in data.split.trials}
        assert line + words.format(*(sizes[s] for s in dropped)) + ".\n" in said


# Before any work


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"id": 1}'])
def test_a_damaged_record_is_said_before_any_work(tmp_path, content):
    (tmp_path / "record.json").write_bytes(content)
    plan = runs.make_plan(runs.DEFAULTS | {"out": str(tmp_path), "device": "cpu"})
    with pytest.raises(ValueError, match="is no record of a run") as caught:
        runs.check_machine(plan)
    assert is_one_sentence(caught.value)


@pytest.mark.parametrize("out", ["/proc/nothing/run", "{file}/run", "a" * 300, "run\0"])
def test_a_folder_that_cannot_be_written_is_said_before_any_work(tmp_path, out):
    (tmp_path / "file").write_text("")
    out = out.format(file=tmp_path / "file")
    plan = runs.make_plan(runs.DEFAULTS | {"out": out, "device": "cpu"})
    with pytest.raises(OSError, match="cannot be written .* use another -p out") as caught:
        runs.check_machine(plan)
    assert is_one_sentence(caught.value)


@pytest.mark.parametrize("given, sentence", [
    ({"seed": 2**64}, "Parameter seed is 18446744073709551616: it must be between"),
    ({"batch_size": 64}, "did you mean 'identities' and 'images'"),
    ({"trial": 2}, "did you mean 'split'"),
    ({"noise": 0.2}, "did you mean 'label_noise'"),
    ({"lr": "1e-x"}, "Parameter lr is '1e-x'"),
    ({"lr": "1e400"}, "Parameter lr is inf"),
    ({"weight_decay": float("inf")}, "Parameter weight_decay is inf"),
    ({"height": 10**9}, "height is 1000000000: it must be between 32 and 4096"),
    ({"depth": 101}, rf"Unknown depth '101'.* \(known: {', '.join(map(str, DEPTHS))}\)"),
    ({"depth": "resnet50"}, rf"Parameter depth is 'resnet50' .* -p depth {min(DEPTHS)}"),
    ({"backbone": "resnet50"}, "did you mean 'depth'"),
    ({"optimiser": "lion"}, r"Unknown optimiser 'lion' \(known: sgd, adam, adamw\)"),
    ({"optimizer": "adam"}, "did you mean 'optimiser'"),
    ({"method": "pmt", "depth": 50}, "Method pmt has no ResNet: leave out -p depth."),
    ({"optimiser": "adam", "nesterov": True}, "afen is trained by adam, without Nesterov's"),
])  # fmt: skip
def test_a_wrong_value_is_one_sentence(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        runs.make_plan(runs.DEFAULTS | given)


@pytest.mark.parametrize("given, changes", [
    ({"lr": "1e-4"}, {"lr": 0.0001}),
    ({"erasing": "5e-1"}, {"erasing": 0.5}),
    ({"height": 384, "width": 192}, {"height": 384, "width": 192}),
    ({"weight_decay": 1e-4}, {"weight_decay": 0.0001}),
    ({"depth": 50}, {"depth": 50}),
    ({"optimiser": "AdamW", "lr": 1e-3}, {"optimiser": "adamw", "lr": 0.001}),
])  # fmt: skip
def test_what_people_type_changes_the_recipe(given, changes):
    plain, plan = runs.make_plan(runs.DEFAULTS), runs.make_plan(runs.DEFAULTS | given)
    assert {name: getattr(plan.recipe, name) for name in changes} == changes
    assert set(plan.changed) == set(changes) and plan.folder != plain.folder


@pytest.mark.parametrize("name", [n for n in method_names() if method_class(n).trunk == "resnet"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_method_with_a_resnet_is_built_in_every_depth(name, depth):
    given = runs.DEFAULTS | {"method": name, "weights": "none", "device": "cpu"}
    plain, plan = (runs.make_plan(given | {"depth": d}) for d in (None, depth))
    with torch.device("meta"):
        sizes = [count_parameters(create(name, 3, p.recipe, **p.options)) for p in (plain, plan)]
    own = plain.recipe.depth
    assert np.sign(sizes[1] - sizes[0]) == np.sign(depth - own)
    assert ("depth" in plan.changed) == (depth != own)


@pytest.mark.parametrize("value", [3, ["x"], {"a": 1}, True])
def test_a_switch_of_a_wrong_type_is_said_before_images_are_read(value):
    options = {"mecs_switches": {"strips": value}}
    plan = runs.make_plan(runs.DEFAULTS | {"options": options, "device": "cpu"})
    with pytest.raises(ValueError, match="strips|switch"):
        runs.check_switches(plan)


# Weights of others


RESNET = torchvision.models.resnet18(weights=None).state_dict()
FIRST = next(iter(RESNET))


@pytest.mark.parametrize("wrap", [
    lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"net": state, "acc": 0.7},
    lambda state: {"model": state},
    lambda state: {f"module.{name}": value for name, value in state.items()},
    lambda state: {"net": {f"module.{name}": value for name, value in state.items()}},
])  # fmt: skip
def test_wrapped_state_dicts_are_read(tmp_path, wrap):
    torch.save(wrap(RESNET), tmp_path / "wrapped.pt")
    network = load_resnet(18, str(tmp_path / "wrapped.pt"))
    assert torch.equal(network.conv1.weight, RESNET[FIRST])


@pytest.mark.parametrize("change, sentence", [
    (lambda s: {k: v for k, v in s.items() if k != FIRST}, f"{FIRST} is missing"),
    (lambda s: s | {"more": torch.ones(1)}, "more is no part of the network"),
    (lambda s: s | {FIRST: torch.ones(3)}, rf"{FIRST} has shape \(3,\) instead of"),
    (lambda s: s | {FIRST: 3}, f"{FIRST} is no tensor"),
    (lambda s: s | {FIRST: s[FIRST] * torch.nan}, f"NaN or infinity in {FIRST}"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused_by_the_first_difference(
    tmp_path, change, sentence
):
    torch.save(change(RESNET), tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match=sentence) as caught:
        load_resnet(18, str(tmp_path / "wrong.pt"))
    assert is_one_sentence(caught.value)


# Nothing is executed from a file, nothing is shown as code


UNSAFE = {"eval", "exec", "compile", "__import__", "os.system", "marshal.loads"}
SAFE_WITH = {  # of functions: the argument that makes them safe, and what it is by default
    "torch.load": ("weights_only", "True", "False"),
    "np.load": ("allow_pickle", "False", "False"),
    "yaml.load": ("Loader", "yaml.SafeLoader", "yaml.Loader"),
}


def unsafe_calls(source):
    """The calls in Python source that may run code from a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "")]
            yield from {"pickle", "cPickle", "dill", "joblib", "shelve"} & set(names)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            argument, safe, default = SAFE_WITH.get(name, ("", "", ""))
            shell = given.get("shell", "False") != "False"
            pandas = name.endswith("read_pickle")
            if name in UNSAFE or given.get(argument, default) != safe or shell or pandas:
                yield f"{name} in line {node.lineno}"


def test_the_walk_sees_what_it_looks_for():
    for source in (
        "import pickle", "from pickle import load", "torch.load(path)", "eval(text)",
        "np.load(path, allow_pickle=True)", "pd.read_pickle(path)",
        "yaml.load(text)", "exec(text)", "subprocess.run(words, shell=True)",
        "torch.load(path, weights_only=False)",
    ):  # fmt: skip
        assert list(unsafe_calls(source)), source
    safe = "torch.load(path, weights_only=True); np.load(path); json.loads(text)"
    assert not list(unsafe_calls(safe))


EXCUSED = {  # what runs is the project's own, and no file of anybody's data
    "tests/test_train.py": "the parameters cell of train.ipynb",
    "tests/test_decisions.py": "the cells of two notebooks",
    "tests/test_claims.py": "the cells of claims.ipynb",
    "tests/test_batches.py": "packed images, pickled and read back in memory",
    "nbs/03_batches.ipynb/d91d90a5": "the same, shown",
}


def sources():
    """All Python that the project holds, by where it stands: files, cells, the workflow."""
    folders = ("afen", "docs", "tests", "workflow", ".ci")
    every = {p: p.read_text() for folder in folders for p in (ROOT / folder).rglob("*.py")}
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" not in path.parts:
            for cell in nbformat.read(path, as_version=4).cells:
                if cell.cell_type == "code":
                    lines = cell.source.splitlines()
                    plain = [x for x in lines if not x.lstrip().startswith(("%", "!"))]
                    every[path / cell.id] = "\n".join(plain)
    return every


def test_nothing_in_the_project_runs_code_from_a_file():
    every = {path: text for path, text in sources().items() if "_build" not in path.parts}
    kinds = {path.relative_to(ROOT).parts[0] for path in every}
    assert {"afen", "docs", "tests", "nbs"} <= kinds and len(every) > 500
    unsafe = {str(p.relative_to(ROOT)): calls
              for p, text in every.items() if (calls := list(unsafe_calls(text)))}  # fmt: skip
    assert unsafe.keys() == EXCUSED.keys(), unsafe


def test_the_workflow_runs_no_code_from_a_file():
    text = (ROOT / "workflow" / "Snakefile").read_text()
    assert not re.search(r"\b(eval|exec|pickle|yaml\.load|torch\.load|np\.load)\b", text)


SCRIPT = "<script>alert('x')</script> & co"


def test_names_from_files_are_no_code_in_a_page():
    page = sortable(SCRIPT, [SCRIPT, "value"], [[(SCRIPT, SCRIPT, {SCRIPT: SCRIPT}), ("1", 1.0, {})]])
    assert "<script" not in page and "&lt;script&gt;" in page


def test_names_from_folders_are_no_code_in_a_page(tmp_path):
    write_tree("folder", tmp_path / "own", n_train=3, n_test=3, n_images=1, size=(24, 12))
    for folder in sorted((tmp_path / "own" / "visible").iterdir())[:1]:
        folder.rename(folder.with_name("<script>alert(1)<"))
    report = verify("folder", tmp_path / "own")
    assert "<script>" in str(report) and "<script" not in report._repr_html_()
    with pytest.warns(UserWarning, match="<script>alert"):
        split = load("folder", tmp_path / "own")
    assert "<script" not in split.train.to_html() + summary(split).to_html()


def test_a_probe_asks_for_the_start_weights_before_it_measures(tiny, tmp_path, monkeypatch):
    torch.save(load_resnet(10, "none").state_dict(), tmp_path / "start.pt")
    plan, _ = in_folder(tiny, tmp_path / "run", weights=str(tmp_path / "start.pt"), epochs=1)
    runs.carry_out(plan)
    (tmp_path / "start.pt").rename(tmp_path / "moved.pt")
    monkeypatch.setattr(probes, "MEASURES", [lambda subject: {"t": [{"a": 1.0}]}])
    given = plan.folder, plan.given["root"], "cpu"
    with pytest.raises(FileNotFoundError, match="start.pt, from which the run started"):
        probes.probe(*given)
    assert probes.probe(*given, tmp_path / "moved.pt")["measures"] == {"t": [{"a": 1.0}]}


def test_a_kept_trunk_is_found_by_name(tiny, tmp_path):
    """The visible-only trunk is given by its path, and a probe is given none."""
    trunk = ROOT / "data" / "trunks" / "visible-00.safetensors"
    plan, _ = in_folder(tiny, tmp_path / "run", weights=str(trunk), epochs=1)
    runs.carry_out(plan)
    network = initial_network(open_run(plan.folder, "cpu"))
    assert network.net.trunk.layer1[0].conv1.weight.equal(
        create("agw", 4, plan.recipe).net.trunk.layer1[0].conv1.weight
    )


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"[" * 10_000, b'{"run": 1}'])
def test_what_is_no_probe_is_one_sentence(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match="robe .*(is no|not) (JSON|valid)") as caught:
        probes.load_probes(tmp_path)
    assert is_one_sentence(caught.value)


def test_names_from_files_are_no_code_in_a_figure(tmp_path):
    curves = {SCRIPT: np.linspace(0.2, 1, 20)}
    figures.save(figures.cmc_curve(curves), tmp_path / "curve", pd.DataFrame(), SCRIPT)
    assert "<script" not in (tmp_path / "curve.svg").read_text()


def test_start_weights_of_a_name_that_no_system_allows():
    with pytest.raises(ValueError, match="does not exist: use imagenet"):
        runs.make_plan(runs.DEFAULTS | {"weights": "a" * 5000})


def test_joints_with_rows_longer_than_their_head_are_refused(tmp_path):
    root = write_tree("regdb", tmp_path / "tree", n_train=2, n_test=2, n_images=1)
    head, *rows = (root / "joints.csv").read_text().splitlines()
    longer = [head, *(f"{row},0.0" for row in rows)]
    (root / "joints.csv").write_text("\n".join(longer))
    with pytest.raises(ValueError, match="longer than its first line"):
        load("regdb", root)
