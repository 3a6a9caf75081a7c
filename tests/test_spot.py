"""SPOT: heat maps, gates and parts by loops, joints that follow the image, gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from afen.augment import MIRRORED, weak_view
from afen.batches import Batch
from afen.core import seed_everything, torch_generator
from afen.method import POCKET_RECIPE, Recipe, create, method_class, method_names
from afen.methods.spot import (
    ASR,
    PARTS,
    SHARPNESS,
    SPOT,
    TPI,
    heat_maps,
    jointed_view,
    part_weights,
    pool,
    structure_loss,
)
from afen.training import make_optimiser, parameter_groups, train_step

SMALL = Recipe(height=48, width=24, depth=18, weights="none", pad=2, lr=0.01)
LABELS = torch.arange(3).repeat_interleave(2)


def random_joints(n: int, size: tuple[int, int], key: str = "joints") -> torch.Tensor:
    """Joints anywhere on n images, about two thirds of them visible."""
    joints = torch.rand(n, 17, 3, generator=torch_generator("test_spot", key))
    scale = torch.tensor([size[1], size[0], 1.5])
    return (joints * scale).where(torch.tensor([True, True, False]), (joints > 0.3) * 1.0)


def noise_batch(step: int, joints: bool = True) -> Batch:
    """Two visible and two infrared noise images of each of three identities."""
    generator = torch_generator("test_spot", step)
    size = SMALL.height, SMALL.width
    images = torch.randint(0, 256, (2, 6, 3, *size), dtype=torch.uint8, generator=generator)
    where = [random_joints(6, size, f"{step} {i}") if joints else None for i in range(2)]
    rows = np.arange(6)
    return Batch(*images, LABELS, LABELS, rows, rows, *where, generator)


def train(method: SPOT, precision: str = "float32", steps: int = 2) -> list[dict]:
    """The losses of a few steps."""
    method.train()
    optimiser, rows = make_optimiser(method), []
    for step in range(steps):
        rows.append(train_step(method, optimiser, noise_batch(step), 0, precision))
    return [{name: loss.item() for name, loss in row.items()} for row in rows]


@pytest.fixture
def method() -> SPOT:
    """A small untrained SPOT."""
    seed_everything(0)
    return create("spot", 3, SMALL)


@pytest.mark.parametrize("size", [(36, 18), (6, 3), (5, 7)])
def test_heat_maps_equal_the_naive_ones(size):
    joints, naive = random_joints(2, (48, 24)), torch.zeros(2, 17, *size)
    for b, j, r, c in np.ndindex(*naive.shape):
        x, y, v = joints[b, j].tolist()
        x, y = x * size[1] / 24 - c - 0.5, y * size[0] / 48 - r - 0.5
        naive[b, j, r, c] = (v > 0) * np.exp(-(x * x + y * y) / (2 * 1.5**2))
    torch.testing.assert_close(heat_maps(joints, (48, 24), size, sigma=1.5), naive)


def test_a_joint_in_the_centre_of_a_cell_is_one_there():
    joints = torch.tensor([[[12.0, 4.0, 1.0]]])  # cells of 8 by 8 pixels
    maps = heat_maps(joints, (48, 24), (6, 3))
    assert maps[0, 0, 0, 1] == 1 and maps.max() == 1


def test_hidden_joints_leave_no_heat_and_no_loss():
    joints = random_joints(2, (48, 24))
    visible = joints[:, :, 2] > 0
    maps = heat_maps(joints, (48, 24), (6, 3))
    assert 0 < visible.sum() < visible.numel()
    assert not maps[~visible].any() and maps[visible].sum((1, 2)).min() > 0
    wrong = maps + 5.0 * ~visible[:, :, None, None]
    assert structure_loss(wrong, maps, visible) == 0
    assert structure_loss(maps + 1, maps, visible).item() == pytest.approx(1)
    assert structure_loss(maps, maps + 1, torch.zeros_like(visible)) == 0


def test_the_view_is_cajs_and_the_joints_flip_with_it():
    images = torch.randint(0, 256, (8, 3, 48, 24), dtype=torch.uint8)
    joints = random_joints(8, (48, 24))
    joints[:, :, 0] = joints[:, :, 0].floor() + 0.5
    joints[:, :, 1] = joints[:, :, 1].floor() + 0.5
    joints[:, :, 2] = 1
    view, moved = jointed_view(images, joints, torch_generator(1), 0.0, 2)
    assert torch.equal(view, weak_view(images, torch_generator(1), 0.0, 2))
    plain = weak_view(images, torch_generator(1), 0.0, 0)  # no crop, other flips
    flat, still = jointed_view(images, joints, torch_generator(1), 0.0, 0)
    assert torch.equal(flat, plain)
    mirrored = (still[:, 0, 0] != joints[:, 0, 0]) | (still[:, 1, 0] != joints[:, 1, 0])
    assert 0 < mirrored.sum() < 8
    left = still[mirrored][:, MIRRORED] * torch.tensor([-1.0, 1, 1])
    torch.testing.assert_close(left + torch.tensor([24.0, 0, 0]), joints[mirrored])


def test_a_mark_on_the_image_stays_under_its_joint():
    images = torch.zeros(16, 3, 48, 24, dtype=torch.uint8)
    joints = torch.zeros(16, 17, 3)
    joints[:, 0] = torch.tensor([9.5, 20.5, 1.0])  # the nose, which no mirror renames
    images[:, :, 20, 9] = 255
    view, moved = jointed_view(images, joints, torch_generator(3), 0.0, 6)
    for image, (x, y, v) in zip(view, moved[:, 0]):
        assert v == 1 and image[0, int(y), int(x)] == image[0].max() > 0
    assert len(moved[:, 0].unique(dim=0)) > 8


def test_the_gate_is_open_at_first_and_reads_structure():
    asr, x = ASR(5), torch.randn(2, 5, 4, 2)
    structure = torch.rand(2, 17, 4, 2)
    assert torch.equal(asr(x, structure), x)
    torch.nn.init.normal_(asr.gate.weight)
    gate = asr.gate.weight[:, :, 0, 0]
    expected = torch.stack([
        2 * torch.sigmoid(gate @ structure[i, :, r, c]) * x[i, :, r, c]
        for i, r, c in np.ndindex(2, 4, 2)
    ])  # fmt: skip
    gated = asr(x, structure).permute(0, 2, 3, 1).reshape(-1, 5)
    torch.testing.assert_close(gated, expected)


def test_parts_are_pooled_where_their_joints_are():
    assert sorted(sum(PARTS.values(), ())) == list(range(17))
    structure, x = torch.rand(2, 17, 6, 3), torch.randn(2, 4, 6, 3)
    weights = part_weights(structure)
    appearance, position = pool(x, weights)
    for i in range(2):
        for p, joints in enumerate(PARTS.values()):
            warm = structure[i, list(joints)].max(0).values
            w = (SHARPNESS * warm).exp() / (SHARPNESS * warm).exp().sum()
            torch.testing.assert_close(weights[i, p], w)
            torch.testing.assert_close(appearance[i, p], (w * x[i]).sum((1, 2)))
            rows, columns = torch.linspace(-5, 5, 6) / 6, torch.linspace(-2, 2, 3) / 3
            mean = torch.stack([(w * rows[:, None]).sum(), (w * columns).sum()])
            torch.testing.assert_close(position[i, p], mean)


def test_the_transformer_knows_which_part_and_where():
    seed_everything(0)
    tpi, x = TPI(8, 16).eval(), torch.ones(1, 8, 12, 6)
    maps = heat_maps(random_joints(1, (48, 24)) * 0 + 1, (48, 24), (12, 6))
    maps = maps * torch.rand(1, 17, 1, 1)
    with torch.no_grad():
        here, down = tpi(x, maps), tpi(x, maps.roll(5, dims=2))
        other = tpi(x, maps.roll(5, dims=1))
    assert not torch.allclose(here, down, atol=1e-3)
    assert not torch.allclose(here, other, atol=1e-3)


def test_gradients_reach_every_parameter(method):
    torch.nn.init.normal_(method.asr.gate.weight)
    sum(method.losses(noise_batch(0), 0).values()).backward()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_structure_is_taught_by_the_joints_and_by_nothing_at_weight_zero(method):
    gains = {}
    for weight in (0.0, 2.0):
        method.options["structure"] = weight
        gains[weight] = method.losses(noise_batch(0), 0)["structure"].item()
    assert gains[0.0] == 0 < gains[2.0]
    method.options["structure"] = 1.0
    assert method.losses(noise_batch(0), 0)["structure"].item() * 2 == gains[2.0]


def test_the_structure_loss_falls_on_one_batch(method):
    method.train()
    optimiser = make_optimiser(method)
    rows = [train_step(method, optimiser, noise_batch(0), 0, "float32") for _ in range(8)]
    assert rows[-1]["structure"] < 0.8 * rows[0]["structure"]


def test_a_batch_without_joints_is_refused_in_one_sentence(method):
    with pytest.raises(ValueError, match="this batch has none"):
        method.losses(noise_batch(0, joints=False), 0)


def test_only_spot_needs_joints():
    assert [name for name in method_names() if method_class(name).needs_joints] == ["spot"]


@pytest.mark.parametrize("modality", ["visible", "infrared"])
def test_embed_needs_no_joints(method, modality):
    train(method)
    images = noise_batch(0).visible
    with torch.no_grad():
        features = method.eval().embed(images, modality)
    assert features.shape == (6, 512) and features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))


def test_the_feature_is_the_weighted_combination(method):
    a, t = torch.randn(2, 4, 512)
    with torch.no_grad():
        torch.testing.assert_close(method.fuse(a, t), (a + t) / 2)
        method.balance.fill_(1.5)
        share = torch.tensor(1.5).sigmoid()
        torch.testing.assert_close(method.fuse(a, t), share * a + (1 - share) * t)


def test_bfloat16_losses_stay_finite_and_near(method):
    rows = train(method, "bfloat16", steps=3)
    assert all(np.isfinite(loss) for row in rows for loss in row.values())
    seed_everything(0)
    plain = train(create("spot", 3, SMALL), steps=1)[0]
    assert rows[0]["structure"] == pytest.approx(plain["structure"], rel=0.05)


def test_head_group_holds_necks_classifier_and_balance(method):
    full, tenth = (set(map(id, g["params"])) for g in parameter_groups(method))
    own = [method.head.neck.weight, method.head.classifier.weight]
    assert full == set(map(id, [*own, method.part_neck.weight, method.balance]))
    frozen = {id(method.head.neck.bias), id(method.part_neck.bias)}
    assert tenth == {id(p) for p in method.parameters()} - full - frozen


def test_recipes_and_refusals():
    assert SPOT.recipes["paper"] == replace(Recipe(), epochs=81, flip=False)
    assert SPOT.recipes["pocket"] == replace(POCKET_RECIPE, flip=False)
    with pytest.raises(ValueError, match="structure"):
        create("spot", 3, SMALL, structure=-1.0)
    with pytest.raises(ValueError, match="Unknown parameter"):
        create("spot", 3, SMALL, joints=True)
