"""PMT: views and sampler by definition and by statistics, phases, schedule, weights."""

import math
from dataclasses import replace
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.transforms.v2 import functional as TF

from afen.augment import MEAN, constant, denormalise, draw_placement
from afen.backbone import count_parameters
from afen.batches import Batch
from afen.core import seed_everything, torch_generator
from afen.losses import batch_hard_triplet
from afen.method import create, method_class
from afen.methods import pmt
from afen.methods.pmt import PMT, InfraredDraw, dcl, msel
from afen.training import (
    lr_factor,
    make_optimiser,
    make_sampler,
    parameter_groups,
    set_lr,
    train_step,
)

PAPER, POCKET_RECIPE = PMT.recipes["paper"], PMT.recipes["pocket"]
LABELS = torch.arange(3).repeat_interleave(2)
DRAWS = 10_000
GRAY, COLOUR = 0, POCKET_RECIPE.epochs - 1  # an epoch of either phase


def noise(count: int, *keys: int | str) -> torch.Tensor:
    """Noise images of the pocket size, uint8 [count, 3, 64, 32]."""
    shape = (count, 3, POCKET_RECIPE.height, POCKET_RECIPE.width)
    generator = torch_generator("test_pmt", *keys)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def noise_batch(step: int = 0) -> Batch:
    """Two visible and two infrared noise images of each of three identities."""
    halves, rows = (noise(6, step, "V"), noise(6, step, "I")), np.arange(6)
    generator = torch_generator("views", step)
    return Batch(*halves, LABELS, LABELS, rows, rows, None, None, generator)


@pytest.fixture
def method() -> PMT:
    """An untrained PMT of the pocket size."""
    seed_everything(0)
    return create("pmt", 3, POCKET_RECIPE)


def near(share: float, p: float) -> bool:
    """Whether a share of the draws is within four standard deviations of p."""
    return abs(share - p) < 4 * math.sqrt(p * (1 - p) / DRAWS)


# The schedule and the phases


def test_rates_are_those_of_the_released_code():
    noted = {
        1: 1.02e-4, 2: 2.01e-4, 3: 2.89e-4, 7: 2.42e-4, 12: 1.51e-4, 18: 4.65e-5,
        23: 4.27e-6, 24: 3e-6,
    }  # fmt: skip
    for epoch, rate in noted.items():  # theirs count from 1
        ours = PAPER.lr * lr_factor(PAPER, epoch - 1)
        assert float(f"{ours:.2e}") == pytest.approx(rate), epoch


@pytest.mark.parametrize("dataset, epochs", [("sysu", 24), ("regdb", 36)])
def test_every_group_has_the_released_rate_at_every_epoch(dataset, epochs):
    """One floor for all groups: 3e-6, whatever a group's own rate."""
    recipe, switches = PMT.configuration("paper", dataset)
    small = replace(recipe, size="tiny", weights="none")
    optimiser = make_optimiser(create("pmt", 3, small, **switches))
    for epoch in range(1, epochs + 1):  # theirs count from 1
        full = set_lr(optimiser, small, epoch - 1)
        expected = []
        for rate in (3e-4, 1.5e-4):
            cosine = 3e-6 + (rate - 3e-6) * (1 + math.cos(math.pi * epoch / epochs)) / 2
            line = 3e-6 + (rate - 3e-6) * epoch / 3
            expected.append(line if epoch < 3 else cosine)
        rates = [group["lr"] for group in optimiser.param_groups]
        assert rates == pytest.approx(expected, rel=1e-12) and full == rates[0]
    assert rates == pytest.approx([3e-6, 3e-6], rel=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", ["agw", "caj", "dart", "xmodal"])
def test_step_schedules_are_a_share_of_the_full_rate(name, share):
    """To the bit where there is no floor, or one group only."""
    recipe = method_class(name).recipes["paper"]
    if recipe.floor:
        share = recipe.backbone_lr
    for epoch in range(recipe.epochs):
        factor = lr_factor(recipe, epoch)
        assert lr_factor(recipe, epoch, share) == factor
        if recipe.warmup <= epoch:
            assert factor == 0.1 ** sum(drop <= epoch for drop in recipe.drops)
        else:
            rise = (epoch + 1) / recipe.warmup
            assert factor == recipe.floor + (1 - recipe.floor) * rise


def test_a_group_that_stands_still_stays_so():
    recipe = replace(POCKET_RECIPE, backbone_lr=0.0)
    optimiser = make_optimiser(create("pmt", 3, recipe))
    set_lr(optimiser, recipe, 0)
    assert optimiser.param_groups[1]["lr"] == 0 < optimiser.param_groups[0]["lr"]


@pytest.mark.parametrize(
    "epochs, gray, expected",
    [
        (24, 0.25, 6), (12, 0.25, 3), (1, 0.25, 1), (36, 1 / 6, 6), (24, 0, 0),
        (24, 1, 24),
    ],
)  # fmt: skip
def test_the_first_epochs_are_grey(epochs, gray, expected):
    recipe = replace(POCKET_RECIPE, epochs=24).scaled(epochs)
    phases = create("pmt", 3, recipe, gray=float(gray)).in_gray
    assert [phases(e) for e in range(epochs)] == [e < expected for e in range(epochs)]


def test_patches_and_blocks_learn_at_half_the_rate():
    seed_everything(0)
    method = create("pmt", 3, replace(PAPER, size="tiny", weights="none"))
    slow = {id(p) for p in method.vit.patch_embed.parameters()}
    slow |= {id(p) for p in method.vit.blocks.parameters()}
    full, half = (set(map(id, g["params"])) for g in parameter_groups(method))
    assert half == slow
    frozen = {id(method.head.neck.bias)}
    assert full == {id(p) for p in method.parameters()} - slow - frozen
    optimiser = make_optimiser(method)
    assert isinstance(optimiser, torch.optim.AdamW)
    set_lr(optimiser, method.recipe, 0)
    rates = [group["lr"] for group in optimiser.param_groups]
    assert rates == pytest.approx([1.02e-4, 5.2e-5])
    assert {group["weight_decay"] for group in optimiser.param_groups} == {1e-4}


# The sampler


def test_sampler_over_many_draws():
    n, own = 20, (6, 5)  # identities, images of each in the two modalities
    labels = np.concatenate([np.repeat(np.arange(n), k) for k in own])
    modality = np.repeat(["visible", "infrared"], [n * k for k in own])
    table = pd.DataFrame({"label": labels, "modality": modality})
    sampler = make_sampler(table, PAPER, seed=0)
    drawn = [sampler.draw(0, step) for step in range(DRAWS)]
    for half, k in zip(map(np.stack, zip(*drawn)), own):  # [DRAWS, 32]
        assert (np.diff(np.sort(half, axis=1)) > 0).all()  # no image twice
        ids = labels[half].reshape(DRAWS, 8, 4)
        assert (ids == ids[:, :, :1]).all()  # four images of one identity
        assert (np.diff(np.sort(ids[:, :, 0], axis=1)) > 0).all()  # eight identities
        shares = np.unique(half, return_counts=True)[1] / DRAWS
        assert len(shares) == n * k
        assert all(near(share, 8 / n * 4 / k) for share in shares)
    assert all((labels[v] == labels[i]).all() for v, i in drawn[:100])


# The views


def test_draws_over_many_images():
    draw = pmt.draw_infrared(DRAWS, torch_generator("draws"))
    assert near(draw.blurred.float().mean().item(), 0.5)
    assert near(draw.brightness_first.float().mean().item(), 0.5)
    ranges = {"sigma": (0.1, 3.0), "brightness": (0.7, 1.3), "contrast": (0.7, 1.3)}
    for name, (low, high) in ranges.items():
        values = getattr(draw, name)
        assert low <= values.min() and values.max() <= high
        uniform = (values - low) / (high - low)
        steps = torch.linspace(0, 1, DRAWS)
        assert (uniform.sort().values - steps).abs().max() < 1.95 / math.sqrt(DRAWS)
    together = torch.stack([column.float() for column in draw])  # [5, DRAWS]
    apart = torch.corrcoef(together) - torch.eye(5)
    assert apart.abs().max() < 4.5 / math.sqrt(DRAWS)  # drawn independently


def test_views_mirror_and_erase_half_of_the_images():
    placement = draw_placement(DRAWS, torch_generator("mirror"), pad=0)
    assert near(placement.flipped.float().mean().item(), 0.5)
    assert not placement.top.any() and not placement.left.any()
    images = torch.full((DRAWS, 3, 16, 8), 128, dtype=torch.uint8)
    view = pmt.visible_view(images, torch_generator("erase"), gray=False)
    filled = (view == constant(MEAN, view)).all(1).flatten(1)  # [DRAWS, 128]
    assert near(filled.any(1).float().mean().item(), 0.5)
    area = filled.float().mean(1)
    assert 0.01 < area[area > 0].min() and area.max() < 0.45


@pytest.mark.parametrize("first", [True, False])
def test_jitter_is_torchvision_s(first):
    images = noise(8, "jitter") / 255
    draw = pmt.draw_infrared(8, torch_generator("jitter"))
    draw = draw._replace(brightness_first=torch.full((8,), first))
    columns = images, draw.brightness, draw.contrast, pmt.jitter(images, draw)
    for image, b, c, ours in zip(*columns):
        steps = [(TF.adjust_brightness, b), (TF.adjust_contrast, c)]
        for step, factor in steps if first else steps[::-1]:
            image = step(image, factor.item())
        torch.testing.assert_close(ours, image, atol=1e-6, rtol=0)


def test_order_of_the_jitter_matters_where_it_clips():
    bright = torch.full((2, 3, 4, 4), 0.9)
    bright[:, :, 0] = 0.5
    factors = torch.tensor([1.3, 1.3])
    order = torch.tensor([True, False])
    draw = InfraredDraw(factors > 9, factors, factors, factors, order)
    one, other = pmt.jitter(bright, draw)
    assert not torch.allclose(one, other)


def test_blur_is_torchvision_s():
    images = noise(6, "blur") / 255
    sigma = torch.tensor([0.1, 0.3, 0.75, 1.0, 2.0, 3.0])
    for image, s, ours in zip(images, sigma, pmt.blur(images, sigma)):
        theirs = TF.gaussian_blur(image, [21, 21], [s.item()] * 2)
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=0)


def test_blur_keeps_its_precision_under_autocast():
    images, sigma = noise(4, "cast") / 255, torch.full((4,), 1.5)
    with torch.autocast("cpu", torch.bfloat16):
        blurred = pmt.blur(images, sigma)
    assert blurred.dtype == torch.float32
    assert torch.equal(blurred, pmt.blur(images, sigma))


def test_an_infrared_view_is_blurred_or_jittered():
    images = noise(64, "either")
    generators = [torch_generator("either") for _ in range(2)]
    view = denormalise(pmt.jittered_view(images, generators[0], erasing=0.0))
    placement = draw_placement(64, generators[1], pad=0)
    draw = pmt.draw_infrared(64, generators[1])
    assert 16 < draw.blurred.sum() < 48
    for i, image in enumerate(images / 255):
        if placement.flipped[i]:
            image = image.flip(2)
        if draw.blurred[i]:  # by a width for 64 rows, not for 256
            expected = TF.gaussian_blur(image, [21, 21], [draw.sigma[i].item() / 4] * 2)
        else:
            one = InfraredDraw(*(column[i : i + 1] for column in draw))
            expected = pmt.jitter(image[None], one)[0]
        torch.testing.assert_close(view[i], expected, atol=1e-5, rtol=0)


def test_colour_comes_with_the_second_phase(method):
    colourful = lambda x: (x.amax(1) - x.amin(1)).amax((1, 2)) > 0.1
    gray, other = (denormalise(view) for view in method.views(noise_batch(), GRAY))
    assert not colourful(gray).any() and colourful(other).all()
    colour, same = (denormalise(view) for view in method.views(noise_batch(), COLOUR))
    assert colourful(colour).all()
    luma = TF.rgb_to_grayscale(colour, 3)
    torch.testing.assert_close(luma, gray, atol=2e-4, rtol=0)
    assert other.shape == same.shape == (6, 3, 64, 32)


# The network


def test_base_has_the_released_shape():
    method = create("pmt", 395, replace(PAPER, weights="none"))
    vit = method.vit
    assert vit.patch_embed.grid_size == (21, 10) and len(vit.blocks) == 12
    assert {b.attn.num_heads for b in vit.blocks} == {12}
    norms = [m for m in vit.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 25 and {m.eps for m in norms} == {1e-5}
    chances = [b.drop_path1.drop_prob for b in vit.blocks[1:]]
    assert isinstance(vit.blocks[0].drop_path1, nn.Identity)
    assert chances == pytest.approx([0.1 * i / 11 for i in range(1, 12)])
    block = vit.blocks[5]
    drops = (vit.pos_drop, block.attn.proj_drop, block.mlp.drop1, block.mlp.drop2)
    assert {m.p for m in drops} == {0.03} and block.attn.attn_drop.p == 0
    C = 768
    one = 4 * C * C + 4 * C + 8 * C * C + 5 * C + 4 * C
    by_hand = (3 * 16**2 + 1) * C + 212 * C + 12 * one + 2 * C + C + 395 * C
    assert count_parameters(method) == by_hand


def test_gradients_reach_all_but_what_cannot_learn(method):
    for epoch in (GRAY, COLOUR):
        method.train().zero_grad()
        sum(method.losses(noise_batch(), epoch).values()).backward()
        without = [n for n, p in method.named_parameters() if p.grad is None]
        assert without == ["head.neck.bias"]  # frozen
        largest = {
            n: p.grad.abs().max().item()
            for n, p in method.named_parameters()
            if p.grad is not None
        }
        assert min(largest.values()) > 0
        for block in method.vit.blocks:  # a shift of all keys leaves softmax alone
            q, k, v = block.attn.qkv.bias.grad.chunk(3)
            assert k.abs().max() < 1e-4 * v.abs().max()
            assert q.abs().max() > 0


def test_losses_of_either_phase_by_hand(method):
    method.eval()  # no dropout: both passes see the same
    labels = torch.cat([LABELS, LABELS])
    for epoch in (GRAY, COLOUR):
        terms = method.losses(noise_batch(), epoch)
        views = torch.cat(method.views(noise_batch(), epoch))
        f, _, logits = method.head(method.vit(views))
        halves = zip(f.chunk(2), logits.chunk(2))
        triplet = sum(batch_hard_triplet(half, LABELS, 0.1) for half, _ in halves)
        expected = {
            "identity_visible": F.cross_entropy(logits[:6], LABELS),
            "identity_infrared": F.cross_entropy(logits[6:], LABELS),
            "triplet": triplet,
        }
        if epoch == COLOUR:
            expected["triplet"] = batch_hard_triplet(f, labels, 0.1)
            expected |= {"msel": msel(f, labels) / 2, "dcl": dcl(f, labels) / 2}
        assert list(terms) == list(expected)
        for name, loss in expected.items():
            torch.testing.assert_close(terms[name], loss)


def test_a_few_steps_lower_the_loss_in_either_phase(method):
    for epoch in (GRAY, COLOUR):
        optimiser, rows = make_optimiser(method.train()), []
        for step in range(6):
            torch.manual_seed(step)
            rows.append(train_step(method, optimiser, noise_batch(), epoch, "float32"))
        assert rows[-1]["loss"] < rows[0]["loss"]


def test_bfloat16_losses_stay_finite(method):
    optimiser = make_optimiser(method.train())
    for epoch in (GRAY, COLOUR):
        losses = train_step(method, optimiser, noise_batch(), epoch, "bfloat16")
        assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("count", [1, 2, 7])
def test_embed_gives_unit_features_of_any_number(method, count):
    images = noise(count, "embed")
    with torch.no_grad():
        visible = method.eval().embed(images, "visible")
        infrared = method.embed(images, "infrared")
        alone = method.embed(images[:1], "visible")
    assert visible.shape == (count, 96)
    assert torch.allclose(visible.norm(dim=1), torch.ones(count))
    assert torch.equal(visible, infrared)  # one network
    assert torch.allclose(visible[:1], alone, atol=1e-5)


# Weights and refusals


def test_positions_are_resampled_as_released():
    square = torch.randn(1, 1 + 14 * 14, 8, generator=torch_generator("square"))
    ours = pmt.resample_positions(square, (21, 10))
    grid = square[0, 1:].reshape(14, 14, 8).permute(2, 0, 1)[None]
    theirs = F.interpolate(grid, (21, 10), mode="bilinear", align_corners=False)
    assert torch.equal(ours[:, 0], square[:, 0])
    torch.testing.assert_close(ours[0, 1:], theirs[0].flatten(1).T)
    assert pmt.resample_positions(ours, (21, 10)) is ours
    with pytest.raises(ValueError, match="Positions of 210 patches"):
        pmt.resample_positions(ours, (5, 5))


def state_of_a_square_vit() -> dict[str, torch.Tensor]:
    """A timm state dict of the tiny size, with a classifier, on a 3 x 3 grid."""
    sides = pmt.SIZES["tiny"]
    torch.manual_seed(1)
    vit = VisionTransformer(img_size=3 * sides["patch_size"], num_classes=10, **sides)
    return vit.state_dict()


def test_a_weights_file_is_loaded(tmp_path):
    path, state = tmp_path / "vit.pth", state_of_a_square_vit()
    torch.save(state, path)
    vit = create("pmt", 3, replace(POCKET_RECIPE, weights=str(path))).vit
    loaded = vit.state_dict()
    for name in loaded:
        if name != "pos_embed":
            assert torch.equal(loaded[name], state[name]), name
    positions = pmt.resample_positions(state["pos_embed"], vit.patch_embed.grid_size)
    assert torch.equal(loaded["pos_embed"], positions)


def test_weights_files_that_do_not_serve(tmp_path):
    def refused(weights: str, error: type[Exception]) -> str:
        with pytest.raises(error) as caught:
            pmt.make_vit("tiny", (64, 32), weights)
        return str(caught.value)

    assert "does not exist" in refused(str(tmp_path / "nowhere.pth"), FileNotFoundError)
    (tmp_path / "text.pth").write_text("not weights")
    assert "no state dict" in refused(str(tmp_path / "text.pth"), ValueError)
    for change in ({"pos_embed": None}, {"stray": torch.zeros(1)}):
        state = state_of_a_square_vit() | change
        state = {k: v for k, v in state.items() if v is not None}
        torch.save(state, tmp_path / "v.pth")
        sentence = refused(str(tmp_path / "v.pth"), ValueError)
        assert f"at {next(iter(change))}" in sentence
    assert "no ImageNet weights" in refused("imagenet", ValueError)


def test_the_download_is_checked_and_its_failure_is_a_sentence(monkeypatch):
    asked = {}

    def offline(url: str, **keywords) -> dict:
        asked.update(keywords, url=url)
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match="-p weights none") as caught:
        create("pmt", 3)
    assert "no route to host" in str(caught.value)
    assert asked["url"].endswith("/jx_vit_base_p16_224-80ecf9dd.pth")
    assert asked["check_hash"] and asked["weights_only"]


def test_what_is_downloaded_is_loaded(monkeypatch):
    state = VisionTransformer().state_dict()  # ViT-B/16 of 224 x 224, 1000 classes
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: state)
    vit = create("pmt", 3).vit
    assert torch.equal(vit.blocks[11].mlp.fc2.weight, state["blocks.11.mlp.fc2.weight"])
    assert vit.pos_embed.shape == (1, 211, 768)


def test_recipes_and_refusals():
    assert (PAPER.height, PAPER.width, PAPER.epochs) == (256, 128, 24)
    assert (PAPER.identities, PAPER.images, PAPER.replacement) == (8, 4, False)
    assert (PAPER.optimiser, PAPER.lr, PAPER.backbone_lr) == ("adamw", 3e-4, 0.5)
    assert (PAPER.weight_decay, PAPER.clip, PAPER.erasing) == (1e-4, None, 0.5)
    assert (PAPER.pad, PAPER.size, PAPER.weights) == (0, "base", "imagenet")
    assert not PAPER.flip and not POCKET_RECIPE.flip and POCKET_RECIPE.size == "tiny"
    with pytest.raises(ValueError, match="size"):
        create("pmt", 3, replace(POCKET_RECIPE, size="huge"))
    with pytest.raises(ValueError, match="gray"):
        create("pmt", 3, POCKET_RECIPE, gray=1.5)
    with pytest.raises(ValueError, match="gray"):
        create("pmt", 3, POCKET_RECIPE, grey=0.5)


# The two losses of its own; golden numbers and invariances are in test_losses


def test_msel_by_hand():
    line = torch.tensor([[0.0], [1.0], [5.0], [7.0]])
    labels = torch.zeros(4, dtype=torch.long)
    # X - S: 6 - 1, 5 - 1, 4.5 - 2, 6.5 - 2
    expected = (25 + 16 + 2.5**2 + 4.5**2) / 4
    assert msel(line, labels).item() == pytest.approx(expected)


def test_dcl_by_hand():
    line = torch.tensor([[0.0], [2.0], [10.0], [14.0]])
    labels = torch.tensor([0, 0, 1, 1])
    # centres 1 and 12; own 1, 1, 2, 2; nearest wrong ones 9 and 10
    assert dcl(line, labels).item() == pytest.approx(1.5 / 9.5)


def test_msel_and_dcl_by_plain_loops():
    draw = torch.Generator().manual_seed(20)
    noise = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    labels, visible = torch.arange(3).repeat_interleave(4).repeat(2), torch.arange(24) < 12
    features = noise(24, 6) + 2 * visible[:, None]
    shifts, to_centre, hard = [], [], []
    for i, feature in enumerate(features):  # Eq. (7)
        d = (features - feature).norm(dim=1)
        same, near = labels == labels[i], visible == visible[i]
        others = same & near & (torch.arange(24) != i)
        shifts.append(d[same & ~near].mean() - d[others].mean())
    for p in range(3):  # Eq. (8)
        d = (features - features[labels == p].mean(0)).norm(dim=1)
        to_centre += d[labels == p]
        wrong = d[labels != p]
        hard.append(wrong[wrong < wrong.mean()].mean())
    mean = lambda values: torch.stack(values).mean()
    torch.testing.assert_close(msel(features, labels), torch.stack(shifts).square().mean())
    torch.testing.assert_close(dcl(features, labels), mean(to_centre) / mean(hard))


def test_dcl_of_equal_distances_is_finite():
    square = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.1, 1.0], [0.1, -1.0]])
    assert dcl(square, torch.tensor([0, 0, 1, 1])).isfinite()
