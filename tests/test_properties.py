"""Properties that hold for any input: hypothesis draws them, the same ones each time.

`EXAMPLES=500` in the environment draws as many for each property, other ones each time.
"""

import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from afen import augment, fem, mecs
from afen.batches import IdentitySampler
from afen.core import seed_everything
from afen.evaluation import evaluate, evaluate_naive
from afen.losses import (
    batch_hard_triplet,
    identity_loss,
    intra_modality_triplet,
    weighted_regularized_triplet,
)
from afen.methods.dart import soft_identity_loss
from afen.methods.pmt import dcl, msel
from afen.methods.xmodal import centre_triplet

settings.register_profile(
    "afen", deadline=None, database=None, derandomize="EXAMPLES" not in os.environ,
    max_examples=int(os.environ.get("EXAMPLES", 15)),
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile("afen")

seeds = st.integers(0, 2**32 - 1)

# Metrics


@st.composite
def rankings(draw):
    """Distances with ties, identities, cameras and a protocol."""
    n_query, n_gallery = draw(st.integers(1, 7)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(seeds))
    levels = draw(st.sampled_from([2, 5, 1000]))  # few of them: many ties
    distances = rng.integers(levels, size=(n_query, n_gallery)) / levels
    protocol = draw(st.sampled_from(["regdb", "sysu", "llcm"]))
    people = draw(st.integers(1, 5))
    ids = rng.integers(people, size=n_query), rng.integers(people, size=n_gallery)
    cams = rng.integers(1, 7, size=n_query), rng.integers(1, 7, size=n_gallery)
    return distances, *ids, *cams, protocol


def scores_or_none(function, *given):
    """The scores; None where no query has a match."""
    try:
        return function(*given)
    except ValueError as error:
        assert "has a match that it may see" in str(error)
        return None


@given(rankings())
def test_the_metrics_are_those_of_the_definition(ranking):
    fast, slow = (scores_or_none(f, *ranking) for f in (evaluate, evaluate_naive))
    assert (fast is None) == (slow is None)
    if fast:
        assert np.allclose(fast.cmc, slow.cmc)
        assert np.isclose(fast.mAP, slow.mAP) and np.isclose(fast.mINP, slow.mINP)
        assert (fast.n_queries, fast.n_dropped) == (slow.n_queries, slow.n_dropped)


@given(rankings())
def test_metrics_are_fractions_and_curves_rise(ranking):
    scores = scores_or_none(evaluate, *ranking)
    assume(scores)
    assert 0 <= scores.cmc.min() and scores.cmc.max() <= 1 and (np.diff(scores.cmc) >= 0).all()
    assert 0 < scores.mINP <= 1 and 0 < scores.mAP <= 1


@given(rankings(), seeds)
def test_the_order_of_queries_and_gallery_does_not_count(ranking, seed):
    distances, q_ids, g_ids, q_cams, g_cams, protocol = ranking
    rng = np.random.default_rng(seed)
    distances = rng.permutation(distances.size).reshape(distances.shape)  # no ties
    before = scores_or_none(evaluate, distances, q_ids, g_ids, q_cams, g_cams, protocol)
    q, g = rng.permutation(len(q_ids)), rng.permutation(len(g_ids))
    moved = distances[q][:, g], q_ids[q], g_ids[g], q_cams[q], g_cams[g], protocol
    after = scores_or_none(evaluate, *moved)
    assert (before is None) == (after is None)
    if before:
        assert np.allclose(before.cmc, after.cmc) and np.isclose(before.mAP, after.mAP)


# Losses


def paired(function):
    """A loss of two modalities as one of a batch."""
    def loss(features, labels):
        (a, b), (x, y) = features.chunk(2), labels.chunk(2)
        return function(a, b, x, y)
    return loss  # fmt: skip


LOSSES = {
    "batch_hard": batch_hard_triplet,
    "weighted": weighted_regularized_triplet,
    "weighted, squared": lambda f, y: weighted_regularized_triplet(f, y, squared=True),
    "within modalities": intra_modality_triplet,
    "msel": msel,
    "dcl": dcl,
    "centres": paired(centre_triplet),
}


@st.composite
def batches(draw, spread=st.just(1.0)):
    """Features and labels of P people, K images in each half."""
    people, images = draw(st.integers(2, 4)), draw(st.integers(2, 3))
    generator = torch.Generator().manual_seed(draw(seeds))
    half = torch.arange(people).repeat_interleave(images)
    features = torch.randn(2 * len(half), draw(st.integers(2, 9)), generator=generator)
    return features * draw(spread), torch.cat([half, half])


def in_another_order(n, seed):
    """Each half of a batch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    halves = [torch.randperm(n // 2, generator=generator) for _ in range(2)]
    return torch.cat([halves[0], halves[1] + n // 2])


@pytest.mark.parametrize("name", LOSSES)
@given(batch=batches(), seed=seeds)
def test_the_order_of_a_batch_does_not_count(name, batch, seed):
    features, labels = batch
    order = in_another_order(len(labels), seed)
    one, other = LOSSES[name](*batch), LOSSES[name](features[order], labels[order])
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@given(batch=batches(st.sampled_from([0.0, 1e-8, 1e-4, 1.0, 1e2, 1e4])), seed=seeds)
def test_losses_and_gradients_are_finite_to_ten_thousand(name, batch, seed):
    features, labels = batch[0].requires_grad_(), batch[1]
    loss = LOSSES[name](features, labels)
    loss.backward()
    assert loss.isfinite() and features.grad.isfinite().all()
    if name != "centres":  # its margin counts negative distances where all are equal
        assert loss >= 0


@pytest.mark.parametrize("name", LOSSES)
@given(batch=batches())
@settings(max_examples=6)
def test_gradients_are_those_of_finite_differences(name, batch):
    features, labels = batch[0].double().requires_grad_(), batch[1]
    loss = lambda f: LOSSES[name](f, labels)
    assert torch.autograd.gradcheck(loss, features, eps=1e-6, atol=1e-4, rtol=1e-3)


@given(people=st.integers(1, 6), n=st.integers(1, 8), seed=seeds,
       scale=st.sampled_from([0.0, 1.0, 1e4]), smoothing=st.sampled_from([0.0, 0.1]))  # fmt: skip
def test_the_identity_loss_is_finite_and_its_gradient_right(people, n, seed, scale, smoothing):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, people, generator=generator, dtype=torch.float64)
    labels = torch.randint(people, (n,), generator=generator)
    loss = identity_loss(scale * logits, labels, smoothing)
    assert loss.isfinite() and loss >= 0
    check = lambda z: identity_loss(z, labels, smoothing)
    assert torch.autograd.gradcheck(check, logits.requires_grad_(), atol=1e-5)
    sure = soft_identity_loss(logits, labels, torch.ones(n).double())
    assert torch.isclose(sure, identity_loss(logits, labels))


# Batches


histograms = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8)


@given(histograms, st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans(), seeds)
def test_any_histogram_gives_balanced_batches_or_a_sentence(
    counts, n_identities, n_images, replacement, lenient, seed
):
    labels = np.concatenate([np.full(v + i, who) for who, (v, i) in enumerate(counts)]).astype(int)
    words = [["visible"] * v + ["infrared"] * i for v, i in counts]
    modality = np.array(sum(words, []), dtype=object)
    assume(len(labels))
    options = {"replacement": replacement, "lenient": lenient, "seed": seed % 100}
    try:
        sampler = IdentitySampler(labels, modality, n_identities, n_images, **options)
    except ValueError as error:
        assert "lower -p" in str(error) or "drop it" in str(error) or "add people" in str(error)
        return
    for rows, name in zip(sampler.draw(seed % 3, seed % 5), ("visible", "infrared")):
        assert (modality[rows] == name).all()
        people, times = np.unique(labels[rows], return_counts=True)
        assert len(people) == n_identities and (times == n_images).all()
        if not replacement:
            assert len(set(rows)) == len(rows)
    visible, infrared = sampler.draw(0, 0)
    assert (labels[visible] == labels[infrared]).all()


# Augmentation


def pictures(n, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), generator=generator).byte()


sizes = {"n": st.integers(1, 9), "height": st.integers(1, 24), "width": st.integers(1, 17)}


@given(**sizes, seed=seeds, pad=st.integers(0, 10), erasing=st.sampled_from([0.0, 0.5, 1.0]))
def test_views_keep_their_size_and_follow_their_seed(n, height, width, seed, pad, erasing):
    images = pictures(n, height, width, seed)
    for view in (augment.weak_view, augment.channel_view, augment.infrared_view):
        first, again = (
            view(images, torch.Generator().manual_seed(seed), erasing, pad) for _ in range(2)
        )
        assert first.shape == images.shape and first.dtype == torch.float32
        assert first.isfinite().all() and torch.equal(first, again)
        assert first.abs().max() < 3


@given(**sizes, seed=seeds, pad=st.integers(0, 10))
def test_both_ways_of_cropping_are_one(n, height, width, seed, pad):
    images = pictures(n, height, width, seed)
    placement = augment.draw_placement(n, torch.Generator().manual_seed(seed), pad)
    padded = torch.nn.functional.pad(images, [pad] * 4)
    slow = augment._cut_at_once(padded, placement, images.shape[2:])
    assert torch.equal(augment.place(images, placement), slow)


@given(**sizes, seed=seeds, pad=st.integers(0, 10))
def test_joints_move_with_their_pixels(n, height, width, seed, pad):
    generator = torch.Generator().manual_seed(seed)
    y, x = (torch.randint(s, (n,), generator=generator) for s in (height, width))
    images = torch.zeros(n, 1, height, width)
    images[torch.arange(n), 0, y, x] = 1
    joints = torch.stack([x + 0.5, y + 0.5, torch.ones(n)], 1)[:, None].repeat(1, 17, 1)
    placement = augment.draw_placement(n, generator, pad)
    moved = augment.place_joints(joints, placement, (height, width))
    for image, (px, py, visible) in zip(augment.place(images, placement)[:, 0], moved[:, 0]):
        assert image.sum() == visible
        if visible:
            assert image[int(py), int(px)] == 1


@given(n=st.integers(1, 5), height=st.integers(1, 60), width=st.integers(1, 40), seed=seeds)
def test_erased_boxes_lie_in_the_image(n, height, width, seed):
    boxes = augment.draw_boxes(n, (height, width), torch.Generator().manual_seed(seed), p=1.0)
    top, left, tall, wide = boxes.T
    assert (boxes >= 0).all() and (top + tall <= height).all() and (left + wide <= width).all()
    share = (tall * wide).float() / (height * width)
    assert (share <= 0.4 + 2 / min(height, width)).all()


# Modules


@pytest.mark.parametrize("room", [mecs, fem], ids=["mecs", "fem"])
@given(reading=st.sampled_from(["paper", "paper_bare", "origin"]), n=st.integers(1, 3),
       height=st.integers(1, 13), width=st.integers(1, 9), seed=seeds)  # fmt: skip
def test_modules_take_any_size_in_any_memory_format(room, reading, n, height, width, seed):
    seed_everything(seed)
    module = room.from_reading(reading, 8).eval()
    if hasattr(module.join, "gain"):
        torch.nn.init.constant_(module.join.gain, 0.5)
    x = torch.randn(n, 8, height, width).relu()
    y = module(x)
    assert y.shape == x.shape and y.isfinite().all()
    last = module.to(memory_format=torch.channels_last)
    assert torch.allclose(last(x.to(memory_format=torch.channels_last)), y, atol=1e-4, rtol=1e-4)
    assert torch.allclose(last(x[:1]), y[:1], atol=1e-4, rtol=1e-4)  # batch of one


@pytest.mark.parametrize("room", [mecs, fem], ids=["mecs", "fem"])
@given(n=st.integers(1, 2), height=st.integers(1, 6), width=st.integers(1, 5), seed=seeds)
@settings(max_examples=6)
def test_gradients_of_modules_are_finite(room, n, height, width, seed):
    seed_everything(seed)
    module = room.from_reading("origin", 8)
    x = torch.randn(n, 8, height, width, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
