"""What is said of a name that is not known, and which spellings are taken."""

import pytest

from afen.core import closest, fold_case, nearest, pick_device
from afen.datasets import NAMES
from afen.grid import METHODS
from afen.method import method_class
from afen.runs import DEFAULTS, PARAMETERS, make_plan


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
