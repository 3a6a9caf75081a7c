"""What is said of a name that is not known, which spellings are taken, whose files go."""

import os

import pytest

from afen.core import check_writable, closest, fold_case, nearest, pick_device, remove_drafts
from afen.datasets import NAMES
from afen.grid import METHODS
from afen.method import method_class
from afen.runs import DEFAULTS, PARAMETERS, main, make_plan, typed


@pytest.mark.parametrize(
    "written, meant",
    [
        ("epoch", "epochs"),
        ("num_epochs", "epochs"),
        ("datset", "dataset"),
        ("learning_rate", "lr"),
        ("lr_backbone", "backbone_lr"),
        ("mecs_aftr", "mecs_after"),
        ("metric", "metric_loss"),
        ("Dataset", "dataset"),  # a name of Python's, so that its case counts
        ("heigth", "height"),
        ("weightdecay", "weight_decay"),
        ("optimizer", "optimiser"),
        ("momentum", None),
        ("schedule", None),
        ("", None),
    ],
)
def test_an_unknown_parameter_is_told_what_it_means(written, meant):
    assert closest(written, PARAMETERS) == meant
    hint = f"did you mean '{meant}'?" if meant else r"Unknown parameter '.*' \(known"
    with pytest.raises(ValueError, match=hint.replace("?", r"\?")):
        make_plan(DEFAULTS | {written: 1})


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_known_by_its_title_in_table_1(name):
    title = method_class(name).title
    if title.casefold() == name:
        plan = make_plan(DEFAULTS | {"method": title})
        assert plan.given["method"] == name
        assert plan.folder == make_plan(DEFAULTS | {"method": name}).folder
    else:
        with pytest.raises(ValueError, match=f"did you mean '{name}'"):
            make_plan(DEFAULTS | {"method": title})


@pytest.mark.parametrize(
    "written, name",
    [("RegDB", "regdb"), ("SYSU", "sysu"), ("LLCM", "llcm"), ("Pocket-SYSU", "pocket-sysu")],
)
def test_a_data_set_may_be_written_in_capitals(written, name):
    assert fold_case(written, NAMES) == name
    assert make_plan(DEFAULTS | {"dataset": written}).given["dataset"] == name


@pytest.mark.parametrize(
    "written, meant",
    [("SYSU-MM01", "sysu"), ("regbd", "regdb"), ("pocket-sys", "pocket-sysu")],
)
def test_an_unknown_data_set_is_told_the_nearest(written, meant):
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        make_plan(DEFAULTS | {"dataset": written})


def test_a_set_like_none_gets_the_list_alone():
    with pytest.raises(ValueError, match=r"Unknown dataset 'Market-1501' \(known: regdb"):
        make_plan(DEFAULTS | {"dataset": "Market-1501"})


@pytest.mark.parametrize(
    "written, meant", [("gpu", "cuda"), ("GPU:1", "cuda"), ("0", "cuda:0"), ("3", "cuda:3")]
)
def test_a_device_is_told_by_its_name_in_torch(written, meant):
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        pick_device(written)


def test_capitals_alone_are_no_other_option():
    assert nearest("b", ["B", "b"], "letter") == fold_case("b", ["B", "b"]) == "b"


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"options": {"mecs_aftr": "layer3"}}, "did you mean 'mecs_after'"),
        ({"method": "dart", "stable": False}, "Method dart has no 'stable'"),
        ({"epochs": 0}, "Parameter epochs is 0: it must be at least 1"),
    ],
)
def test_a_wrong_switch_or_value_is_refused_in_a_plan(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_plan(DEFAULTS | wrong)


@pytest.mark.parametrize(
    "name, word, value",
    [
        ("out", "2024", "2024"),
        ("weights", "1e5", "1e5"),
        ("root", "None", None),
        ("device", "None", "None"),  # which may not be None
        ("epochs", "None", None),
        ("epochs", "3", 3),
        ("flip", "true", True),
        ("flip", "False", False),
        ("options", '{"stable": true, "mecs": null}', {"stable": True, "mecs": None}),
        ("options", "{'stable': True}", {"stable": True}),
        ("seed", "(" * 10_000, "(" * 10_000),
        ("seed", "{[]:1}", "{[]:1}"),
        ("colour", "3", "3"),
    ],
)
def test_a_word_is_read_by_the_kind_of_its_parameter(name, word, value):
    assert typed(name, word) == value and type(typed(name, word)) is type(value)


@pytest.mark.parametrize("word", ["{[]:1}", "3", "stable", "[" * 10_000])
def test_what_is_no_mapping_is_told_how_to_write_one(word):
    with pytest.raises(SystemExit, match="options is .*it must be a mapping") as caught:
        main(["-p", "options", word])
    example = str(caught.value).partition("for example -p options '")[2].removesuffix("'.")
    assert typed("options", example) == {"fem_after": "layer3"}


def test_text_may_be_given_as_papermill_has_it():
    for option in ("-p", "-r"):
        with pytest.raises(SystemExit, match="Unknown method '2024'"):
            main(["-p", "epochs", "1", option, "method", "2024"])


def test_no_file_of_somebody_else_is_a_draft(tmp_path):
    mine = [".backup.20240131", ".git/objects/.tmp.0123abcd", "figures/.old.0123abcd.svg"]
    mine += ["other/run/.checkpoint.afen-0123abcd.pt"]  # whose run may be under way
    drafts = [".checkpoint.afen-0123abcd.pt", "figures/.smoke_cmc.afen-89abcdef.svg"]
    for name in mine + drafts:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
        os.utime(path, (0, 0))
    removed = remove_drafts(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in removed} == set(drafts)
    assert all((tmp_path / name).exists() for name in mine)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    check_writable(tmp_path / "to" / "be made", "use another -o")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file" / "deeper", tmp_path / "file", tmp_path / "a\0b"):
        with pytest.raises(OSError, match=r"cannot be written \(.+\): use another -o\."):
            check_writable(wrong, "use another -o")
