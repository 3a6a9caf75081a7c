"""X-modality: its generator, its one network, its losses, and what it leaves alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from afen.augment import MEAN, weak_view
from afen.backbone import count_parameters
from afen.batches import Batch
from afen.core import torch_generator
from afen.losses import identity_loss, intra_modality_triplet
from afen.method import POCKET_RECIPE, create, method_names
from afen.methods.xmodal import SharedResNet, XGenerator, XModality, centre_triplet
from afen.training import lr_factor

SMALL = replace(POCKET_RECIPE, height=32, width=16, erasing=0.5)
PEOPLE, IMAGES = 3, 2
TERMS = ["identity_visible", "identity_infrared", "identity_x", "triplet", "centre"]


def example(seed: int = 0) -> Batch:
    """Random bytes for three people, two images of each in each modality."""
    generator = torch_generator("test_xmodal", seed)
    shape = 2, PEOPLE * IMAGES, 3, SMALL.height, SMALL.width
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.arange(PEOPLE).repeat_interleave(IMAGES)
    rows = np.arange(len(labels))
    return Batch(*pixels, labels, labels, rows, rows, None, None, generator)


def build(seed: int = 0, **options) -> XModality:
    """The method with weights drawn from `seed`."""
    torch.manual_seed(seed)
    return create("xmodal", PEOPLE, SMALL, **options)


def test_is_a_row():
    assert "xmodal" in method_names()
    with pytest.raises(ValueError, match="released_distance"):
        build(released_distanc=True)
    with pytest.raises(ValueError):
        build(released_distance="yes")


def test_recipe_is_the_released_one():
    recipe = XModality.recipes["paper"]
    assert (recipe.height, recipe.width, recipe.pad) == (256, 128, 10)
    assert (recipe.identities, recipe.images, recipe.erasing) == (12, 4, 0.5)
    assert (recipe.optimiser, recipe.lr, recipe.backbone_lr) == ("adam", 3.5e-4, 1.0)
    assert (recipe.weight_decay, recipe.warmup, recipe.drops) == (5e-4, 10, (39, 69))
    assert (recipe.epochs, recipe.depth, recipe.schedule) == (120, 50, "step")
    assert not recipe.flip and not XModality.recipes["pocket"].flip


@pytest.mark.parametrize(("number", "rate"), [(1, 3.82e-5), (2, 7.28e-5), (10, 3.5e-4)])
def test_rates_are_those_of_the_authors_log(number, rate):
    recipe = XModality.recipes["paper"]
    found = recipe.lr * lr_factor(recipe, number - 1)
    assert abs(found - rate) < 5.1e-8  # half of the last printed digit


def test_generator_starts_as_a_cut_grey():
    generator = XGenerator()
    assert count_parameters(generator) == 10
    pixels = torch.tensor([[1.0, 2.0, -0.5], [-1.0, 0.2, 0.3]])  # sums 2.5 and -0.5
    made = generator(pixels.T[None, :, None])[0, :, 0]  # [3, 2]
    expected = torch.tensor([0.333 * 0.333 * 2.5, 0.0]).expand(3, 2)
    torch.testing.assert_close(made, expected)


def test_generator_weighs_channels_apart():
    generator = XGenerator()
    with torch.no_grad():
        generator.mix.weight.copy_(torch.tensor([2.0, 3.0, -1.0]).view(1, 3, 1, 1))
        generator.mix.bias.fill_(0.5)
        generator.spread.weight.copy_(torch.tensor([1.0, -1.0, 2.0]).view(3, 1, 1, 1))
        generator.spread.bias.copy_(torch.tensor([0.0, 1.0, 5.0]))
    made = generator(torch.tensor([1.0, 1.0, 2.0]).view(1, 3, 1, 1)).flatten()
    assert made.tolist() == [3.5, -2.5, 12.0]  # 2 + 3 - 2 + 0.5 = 3.5


def test_view_is_erased_with_the_mean_in_normalised_space():
    images = torch.zeros(64, 3, 32, 16, dtype=torch.uint8)
    view = weak_view(images, torch_generator("view"), pad=3, fill=MEAN)
    box = (view == torch.tensor(MEAN)[:, None, None]).all(dim=1)  # [64, 32, 16]
    assert 16 < box.flatten(1).any(dim=1).sum() < 48
    assert (view.permute(0, 2, 3, 1)[~box] < -1.7).all()  # black elsewhere
    untouched = weak_view(images, torch_generator("view"), erasing=0.0, pad=3)
    assert (untouched < -1.7).all()


def test_stem_has_no_relu_and_last_stage_keeps_its_size():
    net = SharedResNet(18, "none").eval()
    kinds = [type(layer) for layer in net.layers[:3]]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d]
    x = torch.randn(2, 3, 64, 32, generator=torch_generator("stem"))
    assert net.layers[:3](x).min() < 0
    assert net(x).shape == (2, 512, 4, 2) and net.channels == 512


def test_losses_add_up_to_the_objective():
    method, batch = build(), example()
    found = method.losses(batch, epoch=0)
    views = method.views(example())
    pooled, _, logits = method.head(method.net(torch.cat(views)))
    (v, i, x), y = pooled.chunk(3), batch.visible_labels
    expected = sum(identity_loss(z, y, 0.1) for z in logits.chunk(3))
    expected += sum(intra_modality_triplet(f, y, 1, margin=0.3) for f in (v, i, x))
    for a, b in ((i, v), (v, i), (i, x), (x, i)):
        expected += 0.1 * centre_triplet(a, b, y, y, margin=0.5)
    assert list(found) == TERMS
    torch.testing.assert_close(sum(found.values()), expected)


def test_views_keep_their_order_and_x_comes_from_visible():
    method = build()
    visible, infrared, x = method.views(example())
    torch.testing.assert_close(x, method.generator(visible))
    again = weak_view(example().visible, example().generator, 0.5, SMALL.pad, MEAN)
    assert torch.equal(visible, again) and not torch.equal(visible, infrared)


def test_released_distance_moves_the_centre_term_alone():
    right = build().losses(example(), 0)
    wrong = build(released_distance=True).losses(example(), 0)
    moved = [n for n in TERMS if not torch.allclose(right[n], wrong[n], atol=1e-6)]
    assert moved == ["centre"]


def test_same_draws_same_losses():
    one, two = (build().losses(example(), 0) for _ in range(2))
    other = build().losses(example(1), 0)
    assert all(torch.equal(one[n], two[n]) for n in TERMS)
    assert not torch.equal(one["triplet"], other["triplet"])


def test_every_trainable_parameter_gets_a_gradient():
    method = build()
    sum(method.losses(example(), 0).values()).backward()
    for name, p in method.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.isfinite().all(), name
    assert all(p.grad.abs().sum() > 0 for p in method.generator.parameters())
    assert not method.head.neck.bias.requires_grad


def test_feature_is_the_unit_average_before_the_neck():
    method = build().eval()
    with torch.no_grad():
        method.head.neck.weight.uniform_(0.1, 2.0)  # the neck must not matter
        nn.init.constant_(method.generator.mix.bias, 9.0)  # nor the generator
        images = example().visible
        feature = method.embed(images, "visible")
        mean, std = (
            torch.tensor(v)[:, None, None]
            for v in (MEAN, (0.229, 0.224, 0.225))
        )  # fmt: skip
        pooled = method.net((images / 255 - mean) / std).mean(dim=(2, 3))
    torch.testing.assert_close(feature, pooled / pooled.norm(dim=1, keepdim=True))
    assert torch.equal(feature, method.embed(images, "infrared"))


def test_neck_starts_at_one():
    assert (build().head.neck.weight == 1).all()


def test_head_is_what_has_no_pretrained_weights():
    method = build()
    head = {id(p) for p in method.head_parameters()}
    backbone = {id(p) for p in method.net.parameters()}
    assert head | backbone == {id(p) for p in method.parameters()}
    assert not head & backbone


def test_bfloat16_stays_close():
    with torch.autocast("cpu", torch.bfloat16):
        narrow = build().losses(example(), 0)
    full = build().losses(example(), 0)
    for name in TERMS:
        assert narrow[name].dtype == torch.float32
        torch.testing.assert_close(narrow[name], full[name], rtol=0.1, atol=0.1)


# --- the centre triplet ---------------------------------------------------------------


def test_centre_triplet_by_hand():
    a = torch.tensor([[-1.0], [1.0], [3.0], [5.0]])  # centres 0 and 4
    b = torch.tensor([[1.0], [1.0], [2.5], [2.5]])  # centres 1 and 2.5
    labels = torch.tensor([7, 7, 8, 8])
    # own 1 and 1.5; wrong d(a0, b1) = 2.5 and d(a1, b0) = 3
    assert centre_triplet(a, b, labels, labels, margin=2).item() == pytest.approx(
        (2 + 1 - 2.5 + 2 + 1.5 - 2.5) / 2
    )
    # released: d01^2 = a1^2 + b0^2 - 2 a0 b1 = 17, d10^2 = a0^2 + b1^2 - 2 a1 b0 < 0
    assert centre_triplet(
        a, b, labels, labels, margin=2, released=True
    ).item() == pytest.approx((2 + 1 + 2 + 1.5) / 2, abs=1e-5)


def naive_centre_triplet(a, b, labels, margin, released):
    """Eq. (3) identity by identity, with distances or with Eq. (4)."""
    people = sorted(set(labels.tolist()))
    left = {p: a[labels == p].mean(0) for p in people}
    right = {p: b[labels == p].mean(0) for p in people}

    def length(i, j):
        x, y = (j, i) if released else (i, j)
        square = left[x] @ left[x] + right[y] @ right[y] - 2 * left[i] @ right[j]
        return max(square, 0 * square + 1e-12).sqrt()

    total = 0.0
    for i in people:
        wrong = [min(length(i, j), length(j, i)) for j in people if j != i]
        total = total + max(margin + length(i, i) - min(wrong), 0 * length(i, i))
    return total / len(people)


@pytest.mark.parametrize("released", [False, True])
def test_centre_triplet_by_plain_loops(released):
    draw = torch.Generator().manual_seed(12)
    noise = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    labels = torch.arange(6).repeat_interleave(4)
    people = 0.6 * noise(6, 16)[labels]
    a, b = 0.7 + people + 1.2 * noise(24, 16), 1.3 * people + 1.2 * noise(24, 16)
    found = centre_triplet(a, b, labels, labels, released=released)
    expected = naive_centre_triplet(a, b, labels, 0.5, released)
    assert found > 0.05
    torch.testing.assert_close(found, expected)
