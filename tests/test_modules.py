"""The contract of MECS and FEM: what any network may rely on when it inserts one."""

import math
import re
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from afen import fem, mecs
from afen.backbone import count_multiply_adds, count_parameters
from afen.blocks import silent_parameters
from afen.core import seed_everything, torch_generator

ROOMS = {"mecs": mecs, "fem": fem}
CASES = [(room, reading) for room in ROOMS for reading in ROOMS[room].READINGS]
SIZES = [(36, 18), (18, 9), (6, 3), (1, 1)]
CHANNELS = 16


def build(room: str, reading: str, seed: int = 0, **changes) -> nn.Module:
    """A module of a reading with weights drawn from `seed`."""
    seed_everything(seed)
    return ROOMS[room].from_reading(reading, CHANNELS, **changes)


def feature_map(height: int = 18, width: int = 9) -> torch.Tensor:
    """A random map after a ReLU, [2, CHANNELS, height, width]."""
    generator = torch_generator("test_modules", height, width)
    return torch.randn(2, CHANNELS, height, width, generator=generator).relu()


def zeroed(module: nn.Module) -> dict[str, nn.Conv2d]:
    """The layers that a module sets to zero under "zero_projection", by their names."""
    one = isinstance(module, mecs.MECS)
    layers = [module.last_projection()] if one else module.last_projections()
    return {name: m for name, m in module.named_modules() if m in layers}


def starting(module: nn.Module) -> set[str]:
    """The parameters that learn from the first step: those of the layers that are zero."""
    return {f"{layer}.{kind}" for layer in zeroed(module) for kind in ("weight", "bias")}


def open_gate(module: nn.Module) -> nn.Module:
    """`module` with what is zero at first, its gain or its last layers, away from zero."""
    if hasattr(module.join, "gain"):
        nn.init.constant_(module.join.gain, 0.5)
    if module.join.kind == "zero_projection":
        for layer in zeroed(module).values():
            nn.init.normal_(layer.weight, std=0.1)
    return module


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("room, reading", CASES)
def test_keeps_shape_and_stays_finite(room, reading, size):
    x = feature_map(*size)
    y = open_gate(build(room, reading))(x)
    assert y.shape == x.shape and y.isfinite().all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("room", ROOMS)
def test_default_is_the_identity_before_training(room, size):
    x = feature_map(*size)
    assert torch.equal(build(room, "paper")(x), x)
    assert not torch.allclose(build(room, "paper_bare")(x), x)


@pytest.mark.parametrize("room", ROOMS)
def test_defaults_are_the_paper_reading(room):
    seed_everything(0)
    default = open_gate(getattr(ROOMS[room], room.upper())(CHANNELS))
    x = feature_map()
    assert torch.equal(default(x), open_gate(build(room, "paper"))(x))


@pytest.mark.parametrize("room, reading", CASES)
def test_every_parameter_learns(room, reading):
    module, x = build(room, reading), feature_map()
    silent = silent_parameters(module, x)
    if reading == "paper":  # before a layer that is zero nothing learns yet
        names = {name for name, _ in module.named_parameters()}
        assert set(silent) == names - starting(module)
        torch.optim.SGD(module.parameters(), lr=1e-3).step()
        silent = silent_parameters(module, x)
    assert silent == []


ZERO_STARTS = [  # a last layer that is zero at first, and what is switched beside it
    ("mecs", {}), ("mecs", {"projection": "untied"}),
    ("mecs", {"projection": "untied", "squash": True, "extra": "input"}),
    ("fem", {}), ("fem", {"ratio": 0}), ("fem", {"fuse": "scm"}), ("fem", {"fuse": "skip"}),
    ("fem", {"sites": "bare", "activation": "relu"}),
]  # fmt: skip


@pytest.mark.parametrize("room, changes", ZERO_STARTS, ids=str)
def test_zero_projection_starts_as_the_identity_and_learns_whole(room, changes):
    module, x = build(room, "paper", **changes), feature_map()
    assert torch.equal(module(x), x) and not hasattr(module.join, "gain")
    names, first = {name for name, _ in module.named_parameters()}, starting(module)
    assert first <= names and set(silent_parameters(module, x)) == names - first
    torch.optim.SGD(module.parameters(), lr=1e-2).step()
    assert silent_parameters(module, x) == [] and not torch.allclose(module(x), x)


@pytest.mark.parametrize("room", ROOMS)
def test_a_gate_starts_as_the_identity_and_learns_whole(room):
    module, x = build(room, "paper", join="residual_zero"), feature_map()
    names = {name for name, _ in module.named_parameters()}
    assert torch.equal(module(x), x)
    assert set(silent_parameters(module, x)) == names - {"join.gain"}
    torch.optim.SGD(module.parameters(), lr=1e-3).step()
    assert silent_parameters(module, x) == [] and not torch.equal(module(x), x)


@pytest.mark.parametrize("room", ROOMS)
def test_zero_projection_changes_nothing_but_the_last_layers(room):
    plain, zero = build(room, "paper", join="residual"), build(room, "paper")
    layers, weights = zeroed(zero), plain.state_dict()
    assert list(zero.state_dict()) == list(weights)
    for name, value in zero.state_dict().items():
        last = name.rpartition(".")[0] in layers
        assert not value.any() if last else torch.equal(value, weights[name])


DEAD_STARTS = [
    ("mecs", {"projection": "tied"}, "needs a last 1x1 of its own"),
    ("mecs", {"squash": True}, "with no sigmoid behind it"),
    ("fem", {"activation": "relu"}, "which no gradient passes"),
]


@pytest.mark.parametrize("room, changes, sentence", DEAD_STARTS)
def test_a_start_at_zero_that_cannot_work_is_refused(room, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(room, "paper", **changes)


@pytest.mark.parametrize("room, reading", CASES)
def test_bfloat16_autocast_is_finite_and_close(room, reading):
    module, x = open_gate(build(room, reading)), feature_map()
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x)
        half.float().square().mean().backward()
    assert half.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    full = module(x).detach()
    error = (half.float() - full).norm() / full.norm()
    assert error < 0.05, f"bfloat16 is off by {error:.3f}"


@pytest.mark.parametrize("room, reading", CASES)
def test_state_dict_round_trip(room, reading, tmp_path):
    module, x = open_gate(build(room, reading)), feature_map()
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    other = build(room, reading, seed=1)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("room, reading", CASES)
def test_images_of_a_batch_do_not_mix(room, reading):
    module, x = open_gate(build(room, reading)).eval(), feature_map()
    assert torch.allclose(module(x)[:1], module(x[:1]), atol=1e-5)


# Millions of parameters, from the table of sizes in the decisions, to its two digits.
SIZES_IN_MILLIONS = [
    ("mecs", 256, {}, 0.13),
    ("mecs", 512, {}, 0.45),
    ("mecs", 1024, {}, 1.69),
    ("mecs", 2048, {}, 6.52),
    ("mecs", 1024, {"projection": "untied"}, 3.79),
    ("fem", 256, {}, 0.64),
    ("fem", 1024, {}, 10.04),
    ("fem", 1024, {"ratio": 2}, 5.83),
    ("fem", 1024, {"fuse": "scm"}, 13.78),
]


@pytest.mark.parametrize("room, channels, changes, millions", SIZES_IN_MILLIONS)
def test_parameter_counts(room, channels, changes, millions):
    with torch.device("meta"):
        module = ROOMS[room].from_reading("paper", channels, **changes)
    assert round(sum(p.numel() for p in module.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("room", ROOMS)
def test_wrong_channels_are_refused_in_one_sentence(room):
    sentence = re.escape(f"for maps [B, {CHANNELS}, H, W] and got [2, 4, 6, 3]")
    with pytest.raises(ValueError, match=sentence):
        build(room, "paper")(torch.zeros(2, 4, 6, 3))


EVERY_OPTION = [
    (room, switch, option)
    for room, module in ROOMS.items()
    for switch, options in module.OPTIONS.items()
    for option in options
]


def switched(room: str, switch: str, option: str) -> nn.Module:
    """The paper's reading with one option; x + update, which all options can have."""
    return open_gate(build(room, "paper", **{"join": "residual", switch: option}))


@pytest.mark.parametrize("room, switch, option", EVERY_OPTION)
def test_every_option_works_and_learns(room, switch, option):
    module, x = switched(room, switch, option), feature_map()
    assert module(x).shape == x.shape
    assert silent_parameters(module, x) == []


@pytest.mark.parametrize("room", ROOMS)
def test_no_switch_accepts_an_unknown_option(room):
    for switch in ROOMS[room].OPTIONS:
        with pytest.raises(ValueError, match=f"Unknown {switch} 'nonsense'"):
            build(room, "paper", **{switch: "nonsense"})


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Name and shape of each weight."""
    return {name: weight.shape for name, weight in module.state_dict().items()}


@pytest.mark.parametrize("room, switch, option", EVERY_OPTION)
def test_no_option_is_dead(room, switch, option):
    """It changes the weights there are, or what the same weights compute."""
    first = ROOMS[room].OPTIONS[switch][0]
    default, other = switched(room, switch, first), switched(room, switch, option)
    chosen = option == first
    if shapes(other) != shapes(default):
        assert not chosen
        return
    other.load_state_dict(default.state_dict())
    x = feature_map()
    same_value = chosen or switch == "median_impl"  # two ways to one value
    same_value |= option == "residual"  # differs from zero_projection in its start alone
    assert torch.equal(other(x), default(x)) == same_value


def test_median_gradient_is_the_same_for_both_implementations_without_ties():
    grads = []
    for impl in ("torch", "sort"):
        x = torch.rand(2, 3, 6, 4, generator=torch_generator("ties")).requires_grad_()
        mecs.median_pool(x, impl=impl).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


# The weights of a kept run bear these names.
NAMES = {
    "mecs": "channel.mlp.0 channel.mlp.2 spatial.scales.base spatial.scales.strips.0 "
    "spatial.scales.strips.1 spatial.scales.strips.2 spatial.scales.strips.3 "
    "spatial.scales.strips.4 spatial.scales.strips.5 spatial.point",
    "fem": "norm_mix mix.embed.body.0 mix.embed.body.2 mix.compress.0 mix.compress.2 "
    "mix.refine.smooth.down mix.refine.filters.high.1 mix.refine.filters.high.2 "
    "mix.refine.filters.low.1 mix.refine.filters.low.2 mix.refine.project.0 mix.fuse.0 "
    "norm_mlp mlp.widen.0 mlp.local.0 mlp.narrow",
}


@pytest.mark.parametrize("room", ROOMS)
def test_names_of_the_weights_stay(room):
    layers = product(NAMES[room].split(), ("weight", "bias"))
    names = [f"{layer}.{kind}" for layer, kind in layers]
    assert list(build(room, "paper").state_dict()) == names
    gated = build(room, "paper", join="residual_zero")
    assert list(gated.state_dict()) == [*names, "join.gain"]


class Forgetful(mecs.MECS):
    """A MECS that forgets its channel attention."""

    def update(self, F: torch.Tensor) -> torch.Tensor:
        return self.spatial(F)


def test_silent_parameters_are_those_that_the_module_forgets():
    expected = [f"channel.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    assert silent_parameters(Forgetful(CHANNELS, join="residual"), feature_map()) == expected


FEM_CHANGES = [{}, {"sites": "bare"}, {"low": "smooth"}, {"branches": ("high",)}]


@pytest.mark.parametrize("changes", FEM_CHANGES, ids=str)
@pytest.mark.parametrize("reading", ["paper_bare", "origin"])
def test_every_parameter_of_fem_learns_under_changes(reading, changes):
    assert silent_parameters(build("fem", reading, **changes), feature_map()) == []


def naive_median(x: torch.Tensor, median: str) -> torch.Tensor:
    """`median_pool` by sorting Python lists."""
    chosen = []
    for row in x.flatten(2).flatten(0, 1).tolist():
        ordered, n = sorted(row), len(row)
        low, high = ordered[(n - 1) // 2], ordered[n // 2]
        chosen.append(low if median == "lower" else (low + high) / 2)
    return torch.tensor(chosen).reshape(*x.shape[:2], 1, 1)


MEDIANS = list(product(mecs.OPTIONS["median"], mecs.OPTIONS["median_impl"]))


@pytest.mark.parametrize("size", [(6, 4), (5, 3), (1, 1)])
@pytest.mark.parametrize("median, impl", MEDIANS)
def test_median_agrees_with_sorting_a_list(median, impl, size):
    smooth = torch.randn(2, 3, *size, generator=torch_generator("median", *size))
    for x in (smooth, smooth.round(), smooth.relu()):  # without ties and with
        assert torch.allclose(mecs.median_pool(x, median, impl), naive_median(x, median))


def test_one_convolution_three_times_is_three_with_the_same_weights():
    tied, untied = build("mecs", "origin"), build("mecs", "origin", projection="untied")
    assert not hasattr(tied, "before")
    for other in (untied.before, untied.after):
        other.load_state_dict(untied.spatial.point.state_dict())
    tied.load_state_dict(untied.state_dict(), strict=False)
    assert torch.equal(tied(feature_map()), untied(feature_map()))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("down", fem.OPTIONS["down"])
@pytest.mark.parametrize("up", fem.OPTIONS["up"])
def test_smooth_returns_to_an_odd_size(up, down, kernel):
    F = torch.rand(1, 4, 18, 9, generator=torch_generator("odd"))
    smooth = fem.Smooth(4, down, kernel, up)
    assert smooth.down(F).shape == (1, 4, 9, 5)
    assert smooth(F).shape == F.shape


@pytest.mark.parametrize("embedding", fem.OPTIONS["embedding"])
@pytest.mark.parametrize("fuse", fem.OPTIONS["fuse"])
@pytest.mark.parametrize("branches", [("high", "low"), ("high",), ("low",)], ids=str)
def test_mixer_keeps_the_shape(branches, fuse, embedding):
    mixer = fem.Mixer(CHANNELS, fuse=fuse, embedding=embedding, kernel=5, branches=branches)
    assert mixer(feature_map()).shape == feature_map().shape


def mecs_by_hand(
    channels: int, height: int, width: int, kernels: int, runs: int
) -> tuple[int, int]:
    """Parameters and multiply-adds with `kernels` 1x1 convolutions, run `runs` times."""
    hidden, strips = channels // 4, (7, 11, 21)
    parameters = 2 * channels * hidden + hidden + channels  # the MLP
    parameters += 26 * channels + sum(2 * (k + 1) * channels for k in strips)
    parameters += kernels * (channels**2 + channels)
    per_position = 25 * channels + sum(2 * k * channels for k in strips)
    per_position += runs * channels**2
    return parameters, height * width * per_position + 3 * 2 * channels * hidden


def fem_by_hand(
    C: int, height: int, width: int, ratio: int, scm: bool
) -> tuple[int, int]:
    """Parameters and multiply-adds of FEM without its gain."""
    h, m = C // 2, ratio * C
    parameters = 2 * 2 * C  # the outer norms
    parameters += (10 + 2) * C + (C * h + h + 2 * h)  # CE, compression
    parameters += 10 * h + 2 * (10 + 2) * h + (2 * h * h + h)  # FRM
    parameters += h * C + C  # fuse
    parameters += (C * m + m) + 10 * m + (m * C + C)  # ConvMLP
    each = 9 * C + C * h + 2 * 9 * h + 2 * h * h + h * C + 2 * C * m + 9 * m
    if scm:
        parameters += 49 * h * h // 4 + h + 2 * h + h * C
        each += 49 * h * h // 4 + h * C
    quarter = math.ceil(height / 2) * math.ceil(width / 2)
    return parameters, height * width * each + quarter * 9 * h


COSTS = [
    ("mecs", {"projection": "single"}, {"kernels": 1, "runs": 1}),
    ("mecs", {"projection": "tied"}, {"kernels": 1, "runs": 3}),
    ("mecs", {"projection": "untied"}, {"kernels": 3, "runs": 3}),
    ("fem", {}, {"ratio": 4, "scm": False}),
    ("fem", {"ratio": 2}, {"ratio": 2, "scm": False}),
    ("fem", {"fuse": "scm"}, {"ratio": 4, "scm": True}),
]
STAGES = [(256, 72, 36), (512, 36, 18), (1024, 18, 9), (2048, 18, 9)]


@pytest.mark.parametrize("channels, height, width", STAGES)
@pytest.mark.parametrize("room, changes, terms", COSTS)
def test_costs_are_those_counted_by_hand(room, changes, terms, channels, height, width):
    with torch.device("meta"):  # shapes without numbers: counting needs no more
        x = torch.empty(1, channels, height, width)
        gated = ROOMS[room].from_reading("paper", channels, join="residual_zero", **changes)
        module = ROOMS[room].from_reading("paper_bare", channels, **changes)
    by_hand = {"mecs": mecs_by_hand, "fem": fem_by_hand}[room]
    expected = by_hand(channels, height, width, **terms)
    assert (count_parameters(module), count_multiply_adds(module, x)) == expected
    assert count_parameters(gated) == expected[0] + 1  # the gain


REFUSED = [
    ("mecs", {"pools": ("average", "medain")}, "did you mean 'median'"),
    ("mecs", {"pools": ()}, "give one or more of average, maximum, median"),
    ("mecs", {"strips": (7, 10)}, "kernel has no middle"),
    ("mecs", {"strips": ()}, "strips is empty"),
    ("mecs", {"kernels": "squares", "layout": "chained"}, "Squares cannot be chained"),
    ("mecs", {"kernels": "squares", "strips": (4,)}, "A 4x4 kernel has no middle"),
    ("mecs", {"reduction": 0}, "reduction is 0"),
    ("fem", {"branches": ("high", "middle")}, "Unknown branches 'middle'"),
    ("fem", {"branches": ()}, "give one or more of high, low"),
    ("fem", {"kernel": 4}, "A 4x4 kernel has no middle"),
    ("fem", {"down": "average", "down_kernel": 2}, "A 2x2 kernel has no middle"),
    ("fem", {"compress": 3}, "compress is 3: it must divide 16"),
    ("fem", {"ratio": -1}, "ratio is -1"),
    ("fem", {"fuse": "scm", "compress": 8}, "cannot split 2 channels"),
]


@pytest.mark.parametrize("room, changes, sentence", REFUSED)
def test_a_wrong_switch_is_refused_in_one_sentence(room, changes, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        build(room, "paper", **changes)


@pytest.mark.parametrize("strips", [(7, 11, 21), (3, 5, 9)])
def test_squares_are_one_kernel_for_each_size(strips):
    """Parameters by hand, and the window that one position sees."""
    module = build("mecs", "paper", kernels="squares", strips=strips)
    sizes = [conv.kernel_size for conv in module.spatial.scales.strips]
    assert sizes == [(k, k) for k in strips]
    plain = build("mecs", "paper", strips=strips)
    more = sum(CHANNELS * (k * k + 1 - 2 * (k + 1)) for k in strips)
    assert count_parameters(module) == count_parameters(plain) + more
    open_gate(module)
    x = torch.zeros(1, CHANNELS, 31, 31, requires_grad=True)
    module.spatial.scales(x)[..., 15, 15].sum().backward()
    reach = max(strips) // 2 + 2  # the largest kernel, over the 5x5
    inside = x.grad[0, 0, 15 - reach : 16 + reach, 15 - reach : 16 + reach]
    assert inside.all() and x.grad[0, 0].count_nonzero() == inside.numel()


def test_the_diagram_is_public_copies_that_claim_to_follow_one():
    """F' in Eq. (3), a sigmoid in Eq. (4), three 1x1 convolutions, no residual."""
    module, x = build("mecs", "diagram"), feature_map()
    inner = nn.functional.gelu(module.before(x))
    F1 = module.channel(inner)
    base = module.spatial.scales.base(F1)
    F_s = sum(strip(base) for strip in module.spatial.scales.strips) + F1
    by_hand = module.after(module.spatial.point(F_s).sigmoid() * F1)
    assert torch.allclose(module(x), by_hand, atol=1e-6)


@pytest.mark.parametrize("room", ROOMS)
def test_an_unknown_reading_is_refused(room):
    with pytest.raises(ValueError, match="did you mean 'origin'"):
        build(room, "orgin")
