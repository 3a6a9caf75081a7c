"""AFEN's picture says what its network does; its modules start and learn as they are told."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from afen.backbone import count_parameters, output_shapes
from afen.core import project_root, seed_everything, torch_generator
from afen.fem import FEM
from afen.mecs import MECS
from afen.method import POCKET_RECIPE, Recipe, create
from afen.methods.afen import AFEN, Control
from afen.records import run_id
from afen.runs import DEFAULTS, make_plan
from afen.training import make_optimiser, parameter_groups, set_lr

PARTS = {
    "stem": "net.stems.infrared",
    "layer1": "net.trunk.layer1",
    "layer4": "net.trunk.layer4",
    "GeM": "head.pool",
    "neck": "head.neck",
    "classifier": "head.classifier",
}


def test_the_drawn_shapes_are_those_of_the_network():
    method = create("afen", 395, Recipe(weights="none")).eval()
    visible, infrared = torch.zeros(2, 1, 3, 288, 144)
    with torch.no_grad():
        shapes = output_shapes(method, lambda: method.head(method.net(visible, infrared)))
    kinds = {type(module): name for name, module in method.named_modules()}
    wanted = {part: shapes[name] for part, name in PARTS.items()}
    wanted |= {"MECS": shapes[kinds[MECS]], "FEM": shapes[kinds[FEM]]}
    table = pd.read_csv(project_root() / "figures" / "afen_network.csv", index_col="part")
    drawn = table["shape"].to_dict()
    assert drawn.pop("layer2") == drawn["MECS"] and drawn.pop("layer3") == drawn["FEM"]
    assert drawn == {part: "×".join(map(str, shape[1:])) for part, shape in wanted.items()}


def test_shapes_are_noted_while_a_network_runs_and_not_after():
    network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Identity())
    assert output_shapes(network, lambda: network(torch.zeros(2, 3))) == {
        "0": (2, 5), "1": (2, 5), "": (2, 5),
    }  # fmt: skip
    assert output_shapes(network, lambda: None) == {}
    assert not any(part._forward_hooks for part in network.modules())


SHAPES = replace(POCKET_RECIPE, weights="none")  # no trunk is read where none is asked about
GATES, ZERO = (
    {f"{name}_switches": {"join": join} for name in ("mecs", "fem")}
    for join in ("residual_zero", "zero_projection")
)
STARTS = {
    "modules": {},
    "controls": {"mecs": "control", "fem": "control"},
    "diagram": ZERO | {"mecs": "diagram"},
    "gates": GATES,
}


@pytest.mark.parametrize("name", STARTS)
def test_at_the_start_the_network_is_its_base(name):
    """Behind a gate or a zero_projection: with the same weights every feature is equal."""
    seed_everything(0)
    method = create("afen", 5, SHAPES, **STARTS[name]).eval()
    base = create("afen", 5, SHAPES, mecs="none", fem="none").eval()
    weights = method.state_dict()
    for stage in ("layer2", "layer3"):  # the stage's only block, wrapped with the module
        weights = {k.replace(f"{stage}.0.0.", f"{stage}.0."): v for k, v in weights.items()}
    base.load_state_dict({key: weights[key] for key in base.state_dict()})
    shape, generator = (4, 3, 64, 32), torch_generator("afen", "start")
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    for modality in ("visible", "infrared"):
        assert torch.equal(method(images, modality), base(images, modality))


@pytest.mark.parametrize("join", ["residual_zero", "zero_projection", "residual"])
def test_a_control_has_the_size_and_the_join_of_its_module(join):
    switches = {f"{name}_switches": {"join": join} for name in ("mecs", "fem")}
    sizes = {}
    for reading in ("paper", "control"):
        with torch.device("meta"):
            options = switches | {"mecs": reading, "fem": reading}
            sizes[reading] = count_parameters(create("afen", 5, SHAPES, **options))
    with torch.device("meta"):
        base = count_parameters(create("afen", 5, SHAPES, mecs="none", fem="none"))
    assert abs((sizes["control"] - base) / (sizes["paper"] - base) - 1) < 0.01
    control = Control(64, 5000, join)
    assert (control.join.kind, hasattr(control.join, "gain")) == (join, join[-4:] == "zero")


def groups_of(method):
    """Share of the rate -> names of the parameters that learn at it."""
    names = {id(p): name for name, p in method.named_parameters()}
    return {g["share"]: {names[id(p)] for p in g["params"]} for g in parameter_groups(method)}


def test_modules_learn_with_the_backbone_until_they_are_given_a_rate():
    paper = SHAPES
    assert (paper.backbone_lr, paper.module_lr) == (0.1, None)
    before = groups_of(create("afen", 5, paper))
    assert {0.1, 1.0} == set(before)
    after = groups_of(create("afen", 5, replace(paper, module_lr=0.5)))
    modules = {name for name in before[0.1] if ".0.1." in name}  # behind a stage's only block
    assert any("spatial.point" in n for n in modules) and any("mlp.narrow" in n for n in modules)
    assert after == {0.1: before[0.1] - modules, 1.0: before[1.0], 0.5: modules}
    everything = set().union(*after.values())
    assert len(everything) == sum(map(len, after.values())) == len(set().union(*before.values()))


def test_the_rate_of_the_modules_is_its_share_in_every_epoch():
    recipe = replace(SHAPES, module_lr=1.0)
    method = create("afen", 5, recipe, mecs="control", nonlocal_blocks=True)
    optimiser = make_optimiser(method)
    for epoch in range(recipe.epochs):
        full = set_lr(optimiser, recipe, epoch)
        rates = [group["lr"] for group in optimiser.param_groups]
        assert rates == pytest.approx([full, 0.1 * full, full])
    modules = {id(p) for p in optimiser.param_groups[2]["params"]}
    kinds = {type(m).__name__ for m in method.modules() if m is not method
             and list(m.parameters()) and {id(p) for p in m.parameters()} <= modules}
    assert {"Control", "FEM", "NonLocal"} <= kinds


def plan_of(**given):
    return make_plan(DEFAULTS | given)


def test_a_rate_for_the_modules_is_part_of_a_name_only_where_it_is_given():
    default, given = plan_of(method="caj"), plan_of(method="caj", module_lr=1.0)
    assert "module_lr" not in default.parameters["recipe"]
    assert given.parameters["recipe"]["module_lr"] == 1.0 and given.changed == ("module_lr",)
    assert run_id(default.parameters) != run_id(given.parameters)
    assert Recipe(**default.parameters["recipe"] | {"drops": (7, 9)}).module_lr is None


@pytest.mark.parametrize("preset", ["pocket", "paper"])
def test_the_modules_of_afen_learn_at_the_rate_of_the_head(preset):
    plan = plan_of(dataset="regdb", preset=preset, weights="none")
    assert plan.parameters["recipe"]["module_lr"] == 1.0 and plan.changed == ("weights",)
    slower = plan_of(dataset="regdb", preset=preset, weights="none", module_lr=0.1)
    assert set(slower.changed) == {"weights", "module_lr"}


STRIPS = AFEN.pocket_switches["mecs_switches"]


@pytest.mark.parametrize("preset, given, expected", [
    ("pocket", {}, STRIPS),
    ("pocket", {"join": "residual"}, STRIPS | {"join": "residual"}),
    ("pocket", {"strips": [5]}, {"strips": [5]}),
    ("paper", {"join": "residual"}, {"join": "residual"}),
])  # fmt: skip
def test_a_switch_of_a_module_leaves_its_others_as_the_preset_has_them(preset, given, expected):
    assert STRIPS == {"strips": [3, 5, 9]}
    plan = plan_of(
        dataset="regdb", preset=preset, weights="none", options={"mecs_switches": given}
    )
    assert plan.options["mecs_switches"] == expected and plan.options["fem_switches"] == {}
    assert ("mecs_switches" in plan.changed) == bool(given)
    with torch.device("meta"):
        (module,) = (m for m in create("afen", 5, plan.recipe, **plan.options).modules()
                     if isinstance(m, MECS))  # fmt: skip
    taps = [max(conv.kernel_size) for conv in module.spatial.scales.strips]
    assert sorted({*taps}) == sorted(expected.get("strips", [7, 11, 21]))
    assert module.join.kind == expected.get("join", "zero_projection")


@pytest.mark.parametrize("name", ["pmt", "dart", "spot"])
def test_a_rate_for_modules_that_are_not_there_is_refused(name):
    with pytest.raises(ValueError, match=f"Method {name} inserts no modules"):
        plan_of(method=name, module_lr=1.0)


def test_the_text_is_a_preset_of_afen_alone():
    """Section 4.2 and no more: what it names is as in `paper`, what it does not is off."""
    plan = plan_of(dataset="regdb", preset="text", weights="none")
    paper = AFEN.recipes["paper"]
    named = ("lr", "momentum", "weight_decay", "epochs", "drops", "optimiser", "depth")
    assert all(getattr(plan.recipe, name) == getattr(paper, name) for name in named)
    assert (plan.recipe.erasing, plan.recipe.warmup, plan.recipe.backbone_lr) == (0, 0, 1)
    assert not plan.recipe.nesterov and not plan.recipe.flip and plan.recipe.clip is None
    assert plan.changed == ("weights",) and plan.options == AFEN.defaults
    with pytest.raises(ValueError, match="Unknown preset of caj 'text'"):
        plan_of(dataset="regdb", method="caj", preset="text")
