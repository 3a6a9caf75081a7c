"""The authors' checkpoints, made up with their names: what fits is read, all else is named."""

import io
import os
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from afen import released
from afen.core import project_root
from afen.method import create, method_class
from afen.methods.ddag import IWPA

N = 5  # people


def neck(channels):
    return nn.BatchNorm1d(channels)


def holder(**parts):
    """A module with the given parts, for the names of its tensors."""
    module = nn.Module()
    for name, part in parts.items():
        if isinstance(part, nn.Parameter):
            module.register_parameter(name, part)
        else:
            module.add_module(name, part)
    return module


def parameter(*shape):
    return nn.Parameter(torch.zeros(shape))


def resnets():
    """The three ResNets that the released AGW, CAJ and DDAG build."""
    one, two, three = (torchvision.models.resnet50(weights=None) for _ in range(3))
    return {
        "visible_module": holder(visible=one),
        "thermal_module": holder(thermal=two),
        "base_resnet": holder(base=three),
    }


def head(channels):
    return {"bottleneck": neck(channels), "classifier": nn.Linear(channels, N, bias=False)}


def nonlocal_block(channels):
    conv = nn.Conv2d(channels, 1, 1)
    out = nn.Sequential(nn.Conv2d(1, channels, 1), nn.BatchNorm2d(channels))
    return holder(g=nn.Sequential(conv), W=out, theta=nn.Conv2d(channels, 1, 1),
                  phi=nn.Conv2d(channels, 1, 1))  # fmt: skip


def made_agw():
    blocks = {"NL_2": [512] * 2, "NL_3": [1024] * 3}
    lists = {k: nn.ModuleList(map(nonlocal_block, v)) for k, v in blocks.items()}
    return holder(**resnets(), **head(2048), **lists)


def made_ddag():
    wide = lambda: nn.Conv2d(2048, 2048, 1)  # noqa: E731
    wpa = holder(fc1=nn.Sequential(wide()), fc2=wide(), fc3=wide(), bottleneck=neck(2048),
                 W=nn.Sequential(wide(), nn.BatchNorm2d(2048)), gate=parameter(3))  # fmt: skip
    heads = {f"attention_{i}": holder(W=parameter(2048, 512), a=parameter(1024, 1))
             for i in range(4)}  # fmt: skip
    out = holder(W=parameter(2048, N), a=parameter(2 * N, 1))
    spare = {f"classifier{i}": nn.Linear(2048, N, bias=False) for i in (1, 2)}
    return holder(**resnets(), **head(2048), **spare, wpa=wpa, **heads, out_att=out)


def made_pmt():
    """TransReID's names: timm's for the transformer, below `base`."""
    block = lambda: holder(  # noqa: E731
        norm1=nn.LayerNorm(768), norm2=nn.LayerNorm(768),
        attn=holder(qkv=nn.Linear(768, 2304), proj=nn.Linear(768, 768)),
        mlp=holder(fc1=nn.Linear(768, 3072), fc2=nn.Linear(3072, 768)),
    )  # fmt: skip
    base = holder(
        cls_token=parameter(1, 1, 768), pos_embed=parameter(1, 211, 768),
        patch_embed=holder(proj=nn.Conv2d(3, 768, 16)), norm=nn.LayerNorm(768),
        blocks=nn.ModuleList(block() for _ in range(12)), fc=nn.Linear(768, 1000),
    )  # fmt: skip
    return holder(base=base, **head(768))


MADE = {"agw": made_agw, "caj": made_agw, "ddag": made_ddag, "pmt": made_pmt}


def both(method):
    """State dicts without memory: the authors' and ours."""
    recipe = replace(method_class(method).recipes["paper"], weights="none")
    with torch.device("meta"):
        return MADE[method]().state_dict(), create(method, N, recipe).state_dict()


@pytest.mark.parametrize("method", MADE)
def test_all_of_our_tensors_are_among_theirs(method):
    theirs, ours = both(method)
    found = released.translate(theirs, ours, method, "made.t")
    assert list(found) == list(ours)
    assert all(found[name].shape == value.shape for name, value in ours.items())
    of_theirs = {id(value) for value in theirs.values()}
    made_here = [n for n, v in found.items() if id(v) not in of_theirs and "cgsa" not in n]
    assert made_here == [n for n in ours if n in ("graph_weight", "loss_sum", "loss_count")]
    taken = {id(value) for value in found.values()}
    left = [n for n, v in theirs.items() if id(v) not in taken]
    parts = ("attention_", "out_att", "layer", "fc", "conv1", "bn1", "wpa.W", "classifier")
    assert all(any(part in name for part in parts) for name in left)
    assert {name for name in left if "base_resnet.base.layer" in name} == set()


@pytest.mark.parametrize("method", MADE)
@pytest.mark.parametrize("kind", ["missing", "shape", "unknown", "no tensor"])
def test_what_does_not_fit_is_named(method, kind):
    theirs, ours = both(method)
    name = "bottleneck.running_mean"
    wrong = {
        "missing": {k: v for k, v in theirs.items() if k != name},
        "shape": theirs | {name: torch.zeros(3)},
        "unknown": theirs | {"decoder.weight": torch.zeros(3)},
        "no tensor": theirs | {name: 3.0},
    }[kind]
    sentence = {
        "missing": rf"it lacks {name}\.",
        "shape": rf"it has {name} with shape \(3,\) instead of",
        "unknown": r"it has the unknown decoder\.weight\.",
        "no tensor": rf"it has {name} with shape None",
    }[kind]
    with pytest.raises(ValueError, match=f"made.t is none of {method} as released: {sentence}"):
        released.translate(wrong, ours, method, "made.t")


def test_many_names_are_counted():
    theirs, ours = both("agw")
    few = {k: v for k, v in theirs.items() if not k.startswith("NL_")}  # the released "base"
    with pytest.raises(ValueError, match="it lacks NL_2.0.g.0.weight, .* and 57 more"):
        released.translate(few, ours, "agw", "base.t")


def test_the_heads_of_ddag_keep_their_order():
    heads = {f"attention_{i}.W": torch.full((2, 2), float(i)) for i in range(4)}
    stacked = released.stack_heads(heads | {"out_att.W": torch.ones(2, 3)})
    assert stacked["attention.W"][:, 0, 0].tolist() == [0, 1, 2, 3]
    assert stacked["out_att.W"].shape == (1, 2, 3)


def test_part_attention_under_their_names_gives_their_numbers():
    arrays = np.load(project_root() / "tests" / "golden" / "ddag_iwpa.npz")
    golden = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    theirs = {"wpa." + k.removeprefix("state.m."): v for k, v in golden.items()}
    ours = IWPA(32).double()
    names = {n: released.their_name(f"iwpa.{n}", "ddag") for n in ours.state_dict()}
    ours.load_state_dict({ours_: theirs[name] for ours_, name in names.items()})
    found = ours.eval()(golden["input0"], golden["input1"])
    torch.testing.assert_close(found, golden["output0"], atol=1e-5, rtol=1e-5)


# --- files


AGW = {"NL_2.0.phi.bias": torch.zeros(1), "classifier.weight": torch.zeros(N, 2048)}


@pytest.mark.parametrize(
    "name, method, dataset, trial",
    [
        ("regdb_agw_p4_n8_lr_0.1_seed_0_trial_3_best.t", "agw", "regdb", 3),
        ("sysu_agw_p4_n8_lr_0.1_seed_0_best.t", "agw", "sysu", None),
        ("sysu_adp_joint_co_nog_ch_nog_sq1_aug_G_erase_0.5_p4_n8_lr_0.1_seed_0_best.t",
         "caj", "sysu", None),
        ("SYSU_AGW_best.pth", "agw", "sysu", None),
    ],
)  # fmt: skip
def test_the_file_name_tells_method_data_and_split(tmp_path, name, method, dataset, trial):
    torch.save({"net": AGW, "epoch": 80}, tmp_path / name)
    release = released.read_release(tmp_path / name)
    assert release.methods == (method,) and release.n_identities == N
    assert (release.dataset, release.split, release.seed) == (dataset, trial, 0)
    plan = released.release_plan(release, device="cpu")
    assert plan.given["dataset"] == dataset and plan.given["split"] == (trial or 1)
    again = released.release_plan(release, device="cpu", out=tmp_path)
    assert plan.parameters == again.parameters and plan.folder.name.startswith(dataset)


def test_a_method_that_the_file_is_not_of_is_refused(tmp_path):
    torch.save(AGW, tmp_path / "regdb_best.t")
    release = released.read_release(tmp_path / "regdb_best.t")
    with pytest.raises(ValueError, match="regdb_best.t may be of agw or caj: say which"):
        released.release_plan(release)
    with pytest.raises(ValueError, match="Unknown method for this checkpoint 'ddag'"):
        released.release_plan(release, "ddag")


def save_scores(path, core):
    """A checkpoint with NumPy's scores beside the weights, as NumPy's `core` wrote them."""
    made = io.BytesIO()
    scores = {"acc": np.float64(0.7), "mAP": np.float32(0.6), "epoch": 80}
    torch.save({"net": AGW} | scores, made)
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name).replace(b"numpy._core.", f"numpy.{core}.".encode())
            new.writestr(name, content)


NAMED, NAMELESS = "regdb_agw_trial_3_best.t", "regdb_agw_best.t"


@pytest.mark.parametrize(
    "name, given, split",
    [(NAMED, None, 3), (NAMED, 3, 3), (NAMELESS, 7, 7)],
)
@pytest.mark.parametrize("dataset", ["regdb", "RegDB", "pocket-regdb"])
def test_name_or_option_tells_the_split(tmp_path, dataset, name, given, split):
    torch.save(AGW, tmp_path / name)
    release = released.read_release(tmp_path / name)
    plan = released.release_plan(release, dataset=dataset, split=given, device="cpu")
    assert plan.given["split"] == split


@pytest.mark.parametrize(
    "name, given, sentence",
    [
        (NAMELESS, None, "name of regdb_agw_best.t does not tell the split of RegDB"),
        (NAMED, 1, "of split 3 by its name, and --split says 1"),
        (NAMED, 0, "of split 3 by its name, and --split says 0"),
    ],
)
def test_no_network_is_tested_on_people_that_it_may_have_trained_on(
    tmp_path, name, given, sentence
):
    torch.save(AGW, tmp_path / name)
    release = released.read_release(tmp_path / name)
    with pytest.raises(ValueError, match=sentence) as caught:
        released.release_plan(release, split=given, device="cpu")
    assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0


def test_a_data_set_of_one_split_needs_none_and_a_wrong_name_is_told(tmp_path):
    torch.save(AGW, tmp_path / "sysu_agw_best.t")
    release = released.read_release(tmp_path / "sysu_agw_best.t")
    assert released.release_plan(release, device="cpu").given["split"] == 1
    with pytest.raises(ValueError, match="did you mean 'regdb'"):
        released.release_plan(release, dataset="regbd")


@pytest.mark.parametrize("core", ["core", "_core"])  # NumPy 1 and 2
def test_scores_of_either_numpy_do_not_keep_a_file_from_being_read(tmp_path, core):
    save_scores(tmp_path / "regdb_agw_best.t", core)
    assert released.read_release(tmp_path / "regdb_agw_best.t").methods == ("agw",)


def test_torch_of_before_zip_files_and_parallel_training_are_read(tmp_path):
    parallel = {f"module.{name}": value for name, value in AGW.items()}
    path = tmp_path / "regdb_agw_best.t"
    torch.save({"net": parallel}, path, _use_new_zipfile_serialization=False)
    assert set(released.read_release(path).state) == set(AGW)


class Command:
    """What runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_file_that_runs_code_is_refused(tmp_path):
    torch.save({"net": AGW, "acc": Command(tmp_path / "ran")}, tmp_path / "regdb_agw.t")
    with pytest.raises(ValueError, match="holds no state dict"):
        released.read_release(tmp_path / "regdb_agw.t")
    assert not (tmp_path / "ran").exists()


def test_a_copy_with_other_people_is_refused():
    people = SimpleNamespace(train=SimpleNamespace(identity=np.arange(7)), name="regdb")
    people.train.identity = SimpleNamespace(nunique=lambda: 7)
    release = SimpleNamespace(path=SimpleNamespace(name="a.t"), n_identities=206)
    with pytest.raises(ValueError, match="on 206 people, and regdb has 7 for training"):
        released.check_people(release, SimpleNamespace(split=people))
