"""The losses against the authors' released numbers, invariances, and refusals."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from afen.losses import (
    CLAMP,
    batch_hard_triplet,
    identity_loss,
    intra_modality_triplet,
    leaky_softmax,
    masked_softmax,
    pairwise_distances,
    soft_margin,
    weighted_regularized_triplet,
)
from afen.methods.dart import adaptive_quadruplet, soft_identity_loss
from afen.methods.pmt import dcl, msel
from afen.methods.xmodal import centre_triplet

GOLDEN = Path(__file__).parent / "golden"
REACHES = ("near", "mid", "far")


def noise(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def run(loss, features, *rest):
    features = features.clone().requires_grad_()
    value = loss(features, *rest)
    (gradient,) = torch.autograd.grad(value, features)
    return value.detach(), gradient


def relative(ours, expected):
    """Norm of the difference over the norm of what is expected."""
    return ((ours - expected).norm() / expected.norm()).item()


def wrt(squared=False, stable=True):
    return lambda f, l: weighted_regularized_triplet(f, l, squared, stable)


RELEASED = {
    **{f"triplet_batch_hard_{reach}": batch_hard_triplet for reach in REACHES},
    **{f"wrt_{reach}": wrt(stable=False) for reach in REACHES},
    **{f"wrt_squared_{reach}": wrt(squared=True, stable=False) for reach in REACHES},
    "pmt_msel": msel,
    "pmt_dcl": dcl,
}

# One batch that suits every loss: 4 identities, 4 visible images of each, 4 infrared.
LABELS = torch.arange(4).repeat_interleave(4).repeat(2)
FEATURES = noise(32, 6) + 0.7 * noise(4, 6, seed=1)[LABELS]
CONFIDENCE = torch.rand(32, generator=torch.Generator().manual_seed(2)).double()
PREDICTIONS = torch.randint(4, (32,), generator=torch.Generator().manual_seed(3))


def quadruplet(features, labels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return adaptive_quadruplet(features, labels, CONFIDENCE, PREDICTIONS, generator)


def centres(released):
    def loss(f, l):
        return centre_triplet(f[:16], f[16:], l[:16], l[16:], released=released)

    return loss


LOSSES = {
    "batch_hard": batch_hard_triplet,
    "wrt": wrt(),
    "wrt_released": wrt(stable=False),
    "squared": wrt(squared=True),
    "squared_released": wrt(squared=True, stable=False),
    "intra_modality": intra_modality_triplet,
    "centres": centres(released=False),
    "centres_released": centres(released=True),
    "msel": msel,
    "dcl": dcl,
    "quadruplet": quadruplet,
}
every_loss = pytest.mark.parametrize("name", LOSSES)
# The quadruplet draws by position and compares predictions with labels: tested apart.
undrawn = sorted(LOSSES.keys() - {"quadruplet"})
deterministic_loss = pytest.mark.parametrize("name", undrawn)


# --- the released numbers -------------------------------------------------------------


@pytest.mark.parametrize("name", RELEASED)
def test_released_value_and_gradient(name):
    data = golden(name)
    value, gradient = run(RELEASED[name], data["features"], data["labels"])
    assert relative(value, data["loss"]) < 1e-6
    if data["gradient"].any():
        assert relative(gradient, data["gradient"]) < 1e-6
    else:
        assert name == "wrt_squared_far" and not gradient.any()


def test_every_loss_file_is_compared():
    names = {path.stem for path in GOLDEN.glob("*.npz")}
    losses = {name for name in names if name.startswith(("triplet_", "wrt_", "pmt_"))}
    assert losses == set(RELEASED)


@pytest.mark.parametrize("name", RELEASED)
def test_released_numbers_in_single_precision(name):
    data = golden(name)
    value, gradient = run(RELEASED[name], data["features"].float(), data["labels"])
    assert value.dtype == gradient.dtype == torch.float32
    assert relative(value.double(), data["loss"]) < 1e-4
    assert (gradient - data["gradient"]).norm() <= 1e-3 * data["gradient"].norm()


@pytest.mark.parametrize("squared", [False, True])
def test_stable_form_coincides_near_and_departs_with_distance(squared):
    off = {}
    for reach in REACHES:
        data = golden(f"wrt_squared_{reach}" if squared else f"wrt_{reach}")
        value, gradient = run(wrt(squared), data["features"], data["labels"])
        assert value.isfinite() and gradient.isfinite().all() and gradient.any()
        off[reach] = relative(value, data["loss"])
        if reach == "near":
            assert relative(gradient, data["gradient"]) < 2e-6
        if reach == "mid":
            assert 0.005 < relative(gradient, data["gradient"]) < 0.02
    assert off["near"] < 1e-6
    assert 0.005 < off["mid"] < 0.02
    assert off["far"] > 0.9


# --- by plain loops -------------------------------------------------------------------


def naive_batch_hard(lengths, same):
    """Eq. (C) for one anchor: its distances, and who has its identity."""
    return max(lengths[same].max() - lengths[~same].min() + 0.3, 0 * lengths[0])


def naive_weighted(lengths, same, squared):
    """Eqs. (6) to (8) for one anchor, pair by pair."""
    sums = []
    for sign, chosen in ((1, lengths[same]), (-1, lengths[~same])):
        powers = [(sign * length).exp() for length in chosen]
        sums.append(sum(p / sum(powers) * d for p, d in zip(powers, chosen)))
    u = sums[0] - sums[1]
    phi = (u**2 if u > 0 else -(u**2)) if squared else u
    return torch.log(1 + torch.exp(phi))


@pytest.mark.parametrize(
    ("loss", "naive"),
    [
        (batch_hard_triplet, naive_batch_hard),
        (wrt(), lambda d, same: naive_weighted(d, same, squared=False)),
        (wrt(squared=True), lambda d, same: naive_weighted(d, same, squared=True)),
    ],
)
def test_triplets_by_plain_loops(loss, naive):
    """To 1e-5: the floor puts an anchor at 1e-6 from itself instead of zero."""
    anchors = [
        naive(torch.stack([(f - g).norm() for g in FEATURES]), LABELS == label)
        for f, label in zip(FEATURES, LABELS)
    ]
    expected = torch.stack(anchors).mean()
    torch.testing.assert_close(loss(FEATURES, LABELS), expected, rtol=1e-5, atol=0)


# --- what the weighted triplet does where the released form fails ---------------------


def test_negative_weights_sum_to_one_only_in_the_stable_form():
    mask = torch.ones(1, 85, dtype=torch.bool)
    mask[0, 0] = False
    scores = torch.full((1, 85), -20.0, dtype=torch.float64)
    assert masked_softmax(scores, mask).sum().item() == pytest.approx(1, abs=1e-12)
    total = 84 * math.exp(-20)
    expected = total / (total + 1e-6)
    assert leaky_softmax(scores, mask).sum().item() == pytest.approx(expected)
    assert expected < 0.2


def test_positive_weights_do_not_leak_in_either_form():
    scores = 25 + noise(4, 8)
    mask = torch.ones(4, 8, dtype=torch.bool)
    torch.testing.assert_close(
        leaky_softmax(scores, mask), masked_softmax(scores, mask), rtol=2e-6, atol=0
    )


@pytest.mark.parametrize("stable", [False, True])
def test_squared_loss_is_log_two_without_slope_at_zero(stable):
    u = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loss = soft_margin(u, squared=True, stable=stable)
    assert loss.tolist() == pytest.approx([math.log(2)] * 3)
    assert torch.autograd.grad(loss.sum(), u)[0].tolist() == [0, 0, 0]


def test_linear_loss_has_slope_one_half_at_zero():
    u = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(soft_margin(u).sum(), u)[0].item() == 0.5


@pytest.mark.parametrize("stable", [False, True])
def test_collapsed_features_are_stationary_at_log_two(stable):
    collapsed = torch.ones(32, 6, dtype=torch.float64)
    value, gradient = run(wrt(squared=True, stable=stable), collapsed, LABELS)
    assert value.item() == pytest.approx(math.log(2), abs=1e-9)
    assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stable_form_is_finite_at_thirty(dtype):
    u = torch.tensor([30.0, -30.0], dtype=dtype, requires_grad=True)
    loss = soft_margin(u, squared=True)
    (slope,) = torch.autograd.grad(loss.sum(), u)
    assert loss[0].item() == pytest.approx(900) and loss[1].item() < 1e-12
    assert slope[0].item() == pytest.approx(60) and slope[1].item() == 0


def test_released_form_is_silent_beyond_its_clamp():
    u = torch.tensor([9.3, 9.4, 30.0], dtype=torch.float64, requires_grad=True)
    loss = soft_margin(u, squared=True, stable=False)
    (slope,) = torch.autograd.grad(loss.sum(), u)
    assert slope[0].item() == pytest.approx(18.6) and slope[1:].tolist() == [0, 0]
    assert loss[2].item() == pytest.approx(CLAMP)


def test_squared_form_is_the_piecewise_equation():
    u = torch.linspace(-4, 4, 33, dtype=torch.float64)
    phi = torch.where(u > 0, u**2, -(u**2))
    torch.testing.assert_close(soft_margin(u, squared=True), (1 + phi.exp()).log())


def test_alpha_sharpens_the_weights():
    blunt, plain, sharp = (
        weighted_regularized_triplet(FEATURES, LABELS, alpha=alpha)
        for alpha in (0.0, 1.0, 5.0)
    )
    assert blunt < plain < sharp
    distances, same = pairwise_distances(FEATURES), LABELS[:, None] == LABELS
    positive = (distances * same).sum(1) / same.sum(1)
    negative = (distances * ~same).sum(1) / (~same).sum(1)
    expected = (1 + (positive - negative).exp()).log().mean()
    torch.testing.assert_close(blunt, expected)


# --- what no loss may depend on -------------------------------------------------------


@deterministic_loss
def test_renaming_the_identities_changes_nothing(name):
    renamed = torch.tensor([31, 4, 15, 9])[LABELS]
    other, expected = (LOSSES[name](FEATURES, labels) for labels in (renamed, LABELS))
    torch.testing.assert_close(other, expected)


def test_renaming_identities_and_predictions_changes_no_quadruplet():
    names = torch.tensor([31, 4, 15, 9])
    values = [
        adaptive_quadruplet(
            FEATURES, labels, CONFIDENCE, predictions, torch.Generator().manual_seed(5)
        )
        for labels, predictions in (
            (LABELS, PREDICTIONS), (names[LABELS], names[PREDICTIONS])
        )
    ]
    assert torch.equal(*values)


@deterministic_loss
def test_order_inside_a_modality_changes_nothing(name):
    generator = torch.Generator().manual_seed(4)
    order = torch.randperm(16, generator=generator)
    order = torch.cat([order, 16 + torch.randperm(16, generator=generator)])
    value, gradient = run(LOSSES[name], FEATURES, LABELS)
    moved, moved_gradient = run(LOSSES[name], FEATURES[order], LABELS[order])
    torch.testing.assert_close(moved, value)
    torch.testing.assert_close(moved_gradient, gradient[order])


@every_loss
def test_translation_changes_nothing_but_the_released_centres(name):
    value, moved = LOSSES[name](FEATURES, LABELS), LOSSES[name](FEATURES + 3, LABELS)
    assert torch.allclose(value, moved) == (name != "centres_released")


@every_loss
def test_gradient_matches_finite_differences(name):
    leaf = FEATURES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: LOSSES[name](f, LABELS), leaf, atol=1e-4)


# --- precision ------------------------------------------------------------------------


@every_loss
def test_losses_are_float32_under_bfloat16(name):
    weight = noise(8, 6, seed=8, dtype=torch.float32).requires_grad_()
    pixels = noise(32, 8, seed=9, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = pixels @ weight
        loss = LOSSES[name](features, LABELS)
    assert features.dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss, LOSSES[name](features.float(), LABELS))
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.isfinite().all() and gradient.any()


def test_identity_losses_are_float32_under_bfloat16():
    logits = noise(32, 4, dtype=torch.float32).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = (
            identity_loss(logits, LABELS, smoothing=0.1),
            soft_identity_loss(logits, LABELS, CONFIDENCE.bfloat16()),
        )
    assert [loss.dtype for loss in losses] == [torch.float32] * 2
    torch.testing.assert_close(losses[0], identity_loss(logits.float(), LABELS, 0.1))


def test_distances_keep_their_digits_far_from_the_origin():
    features = (50 + 0.01 * noise(16, 256)).float()
    exact = torch.cdist(features.double(), features.double())
    pairs = ~torch.eye(16, dtype=torch.bool)
    error = (pairwise_distances(features) / exact - 1)[pairs].abs().max()
    assert error < 1e-4


def test_distance_gradient_is_finite_for_duplicates():
    features = FEATURES[[0, 0, 1, 1]].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(pairwise_distances(features).sum(), features)
    assert gradient.isfinite().all()


# --- by hand --------------------------------------------------------------------------


def test_batch_hard_by_hand():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    labels = torch.tensor([0, 0, 1, 1])
    # farthest positive - nearest negative: 1 - 3, 1 - 2, 4 - 2, 4 - 6
    assert batch_hard_triplet(line, labels).item() == pytest.approx((4 - 2 + 0.3) / 4)
    assert batch_hard_triplet(line, labels, margin=1.5).item() == pytest.approx(
        (0 + 0.5 + 3.5 + 0) / 4
    )


def test_intra_modality_never_compares_modalities():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    labels = torch.tensor([0, 0, 1, 1])
    both = intra_modality_triplet(torch.cat([line, line + 0.1]), labels.repeat(2))
    assert both.item() == pytest.approx(2 * batch_hard_triplet(line, labels).item())


def test_centre_triplet_is_symmetric():
    for released in (False, True):
        there = centres(released)(FEATURES, LABELS)
        back = centres(released)(FEATURES.roll(16, 0), LABELS)
        torch.testing.assert_close(there, back)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_identity_loss_by_definition(smoothing):
    logits, labels = noise(6, 4), torch.tensor([0, 1, 2, 3, 3, 0])
    probability = logits.exp() / logits.exp().sum(1, keepdim=True)
    target = torch.full((6, 4), smoothing / 4, dtype=torch.float64)
    target[range(6), labels] += 1 - smoothing
    expected = -(target * probability.log()).sum() / 6
    torch.testing.assert_close(identity_loss(logits, labels, smoothing), expected)


def test_quadruplet_without_a_sure_anchor_is_zero_with_a_gradient():
    leaf = FEATURES.clone().requires_grad_()
    loss = adaptive_quadruplet(
        leaf, LABELS, torch.zeros(32), PREDICTIONS, torch.Generator().manual_seed(0)
    )
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, leaf)[0].any()


def test_quadruplet_draws_depend_on_the_generator_alone():
    first, again, other = (quadruplet(FEATURES, LABELS, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- refusals -------------------------------------------------------------------------

NEEDS_TRIPLETS = {
    "batch_hard": batch_hard_triplet,
    "wrt": weighted_regularized_triplet,
    "dcl": dcl,
    "quadruplet": quadruplet,
}


@pytest.mark.parametrize("name", NEEDS_TRIPLETS)
@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (torch.zeros(32, dtype=torch.long), "two identities or more"),
        (torch.arange(32), "Identity 0 has one image"),
        (torch.arange(32).clamp(max=30) % 30, "Identity 1 has one image"),
        (LABELS[:31], r"features \[N, D\] and labels \[N\]"),
    ],
)
def test_batches_without_triplets_are_refused(name, labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        NEEDS_TRIPLETS[name](FEATURES, labels)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (LABELS + 1, "1 to 4, but the classifier has 4"),
        (LABELS - 1, "-1 to 2"),
        (LABELS[:5], "32 rows"),
    ],
)
def test_labels_without_logits_are_refused(labels, sentence):
    logits = noise(32, 4)
    with pytest.raises(ValueError, match=sentence):
        identity_loss(logits, labels)
    with pytest.raises(ValueError, match=sentence):
        soft_identity_loss(logits, labels, CONFIDENCE)


def test_unequal_modalities_are_refused():
    with pytest.raises(ValueError, match="does not divide into 3 modalities"):
        intra_modality_triplet(FEATURES, LABELS, modalities=3)
    with pytest.raises(ValueError, match="each half"):
        msel(FEATURES[:31], LABELS[:31])
    with pytest.raises(ValueError, match="each half"):
        msel(FEATURES, LABELS.sort().values)
    with pytest.raises(ValueError, match="the same two or more"):
        centre_triplet(FEATURES[:16], FEATURES[16:], LABELS[:16], 1 + LABELS[16:])
    with pytest.raises(ValueError, match="the same two or more"):
        centre_triplet(FEATURES[:4], FEATURES[16:20], LABELS[:4], LABELS[16:20])
