"""The contract of MECS and FEM: what any network may rely on when it inserts one."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from afen import fem, mecs
from afen.core import seed_everything, torch_generator
from afen.mecs import silent_parameters

ROOMS = {"mecs": mecs, "fem": fem}
CASES = [(room, preset) for room in ROOMS for preset in ROOMS[room].READINGS]
SIZES = [(36, 18), (18, 9), (6, 3), (1, 1)]
CHANNELS = 16


def build(room: str, preset: str, seed: int = 0, **changes) -> nn.Module:
    """A module of a preset with weights drawn from `seed`."""
    seed_everything(seed)
    return ROOMS[room].from_reading(preset, CHANNELS, **changes)


def feature_map(height: int = 18, width: int = 9) -> torch.Tensor:
    """A random map after a ReLU, [2, CHANNELS, height, width]."""
    generator = torch_generator("test_modules", height, width)
    return torch.randn(2, CHANNELS, height, width, generator=generator).relu()


def open_gate(module: nn.Module) -> nn.Module:
    """`module` with its gain, where it has one, away from zero."""
    if hasattr(module.join, "gain"):
        nn.init.constant_(module.join.gain, 0.5)
    return module


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("room, preset", CASES)
def test_keeps_shape_and_stays_finite(room, preset, size):
    x = feature_map(*size)
    y = open_gate(build(room, preset))(x)
    assert y.shape == x.shape and y.isfinite().all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("room", ROOMS)
def test_default_is_the_identity_before_training(room, size):
    x = feature_map(*size)
    assert torch.equal(build(room, "paper")(x), x)
    assert not torch.allclose(build(room, "paper_bare")(x), x)


@pytest.mark.parametrize("room", ROOMS)
def test_defaults_are_the_paper_preset(room):
    seed_everything(0)
    default = open_gate(getattr(ROOMS[room], room.upper())(CHANNELS))
    x = feature_map()
    assert torch.equal(default(x), open_gate(build(room, "paper"))(x))


@pytest.mark.parametrize("room, preset", CASES)
def test_every_parameter_learns(room, preset):
    module, x = build(room, preset), feature_map()
    silent = silent_parameters(module, x)
    if preset == "paper":  # behind the closed gate nothing but the gate learns
        names = {name for name, _ in module.named_parameters()}
        assert set(silent) == names - {"join.gain"}
        torch.optim.SGD(module.parameters(), lr=1e-3).step()
        silent = silent_parameters(module, x)
    assert silent == []


@pytest.mark.parametrize("room, preset", CASES)
def test_bfloat16_autocast_is_finite_and_close(room, preset):
    module, x = open_gate(build(room, preset)), feature_map()
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x)
        half.float().square().mean().backward()
    assert half.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    full = module(x).detach()
    error = (half.float() - full).norm() / full.norm()
    assert error < 0.05, f"bfloat16 is off by {error:.3f}"


@pytest.mark.parametrize("room, preset", CASES)
def test_state_dict_round_trip(room, preset, tmp_path):
    module, x = open_gate(build(room, preset)), feature_map()
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    other = build(room, preset, seed=1)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("room, preset", CASES)
def test_images_of_a_batch_do_not_mix(room, preset):
    module, x = open_gate(build(room, preset)).eval(), feature_map()
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


@pytest.mark.parametrize("room, switch, option", EVERY_OPTION)
def test_every_option_works_and_learns(room, switch, option):
    module = open_gate(build(room, "paper", **{switch: option}))
    x = feature_map()
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
    default = open_gate(build(room, "paper"))
    other = open_gate(build(room, "paper", **{switch: option}))
    chosen = option == ROOMS[room].OPTIONS[switch][0]
    if shapes(other) != shapes(default):
        assert not chosen
        return
    other.load_state_dict(default.state_dict())
    x = feature_map()
    same_value = chosen or switch == "median_impl"  # two ways to one value
    assert torch.equal(other(x), default(x)) == same_value


def test_median_gradient_is_the_same_for_both_implementations_without_ties():
    grads = []
    for impl in ("torch", "sort"):
        x = torch.rand(2, 3, 6, 4, generator=torch_generator("ties")).requires_grad_()
        mecs.median_pool(x, impl=impl).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
