"""DART: the mixture, confidences swapped, networks apart, noise, and resuming."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.mixture import GaussianMixture

from afen.batches import Batch, pack
from afen.core import seed_everything, torch_generator
from afen.datasets import load, with_noise
from afen.losses import identity_loss
from afen.method import Recipe, create
from afen.methods import dart
from afen.methods.dart import (
    DART,
    adaptive_quadruplet,
    clean_probability,
    confidences,
    fit_mixture,
    network_losses,
    soft_identity_loss,
)
from afen.people import write_tree
from afen.training import (
    Run,
    embed,
    load_checkpoint,
    make_optimiser,
    make_sampler,
    parameter_groups,
    save_checkpoint,
    train_step,
)

SMALL = Recipe(
    height=32, width=16, depth=18, weights="none", pad=2, lr=0.01, warmup=0,
    identities=3, images=2, epochs=3, flip=False,
)  # fmt: skip
LABELS = torch.arange(3).repeat_interleave(2)
ROWS = np.arange(6)


def noise_batch(step: int, draws: int = 2) -> Batch:
    """Rows 0 to 5 visible, 6 to 11 infrared, of three identities, `draws` times."""
    generator = torch_generator("test_dart", step)
    shape = (2, 6 * draws, 3, SMALL.height, SMALL.width)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels, rows = LABELS.repeat(draws), np.tile(ROWS, draws)
    return Batch(*images, labels, labels, rows, rows + 6, None, None, generator)


def half(batch: Batch, index: int) -> Batch:
    """The part of a network, with a generator of its own at a known state."""
    return replace(batch.parts(2)[index], generator=torch_generator("half", index))


@pytest.fixture
def method() -> DART:
    """A small untrained DART in training mode, with confidences of its own making."""
    seed_everything(0)
    method = create("dart", 3, SMALL).train()
    method.confidence = torch.rand(2, 3, 12, generator=torch_generator("trust"))
    return method


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A small rendered set: the split, and where packed images go."""
    folder = tmp_path_factory.mktemp("dart")
    size = {"n_train": 6, "n_test": 4, "n_images": 3, "size": (32, 16)}
    return load("regdb", write_tree("regdb", folder / "tree", **size)), folder


def start(tree, rate: float, folder=None, resume: bool = False, **changes) -> Run:
    """A run on the tree with some labels made wrong."""
    split, cache = tree
    train = with_noise(split, rate, seed=4).train
    packed = pack(split.root, train.path, (SMALL.height, SMALL.width), cache)
    seed_everything(0)
    method = create("dart", train.identity.nunique(), replace(SMALL, **changes))
    return Run(method, train, packed, seed=1, steps=1, folder=folder, resume=resume)


# --- how sure a label is ------------------------------------------------------------


def test_the_mixture_finds_the_lower_component():
    rng = np.random.default_rng(0)
    low, high = rng.normal(0.1, 0.04, 300), rng.normal(0.7, 0.1, 100)
    for losses in (np.r_[low, high], np.r_[high, low]):  # whichever comes first
        losses = losses.clip(0, 1)
        found = clean_probability(fit_mixture(losses, 0), losses)
        assert found.shape == (400,) and ((found >= 0) & (found <= 1)).all()
        assert ((found > 0.5) == (losses < 0.4)).mean() > 0.98


def test_the_posterior_is_that_of_two_normal_densities():
    rng = np.random.default_rng(1)
    losses = np.r_[rng.normal(0.2, 0.05, 200), rng.normal(0.8, 0.1, 100)]
    fitted = GaussianMixture(2, tol=1e-2, reg_covar=5e-4, random_state=3)
    fitted.fit(losses[:, None])
    assert np.array_equal(fitted.means_, fit_mixture(losses, 3).means_)
    mean, variance = fitted.means_[:, 0], fitted.covariances_[:, 0, 0]
    density = fitted.weights_ / np.sqrt(variance) * np.exp(
        -((losses[:, None] - mean) ** 2) / (2 * variance)
    )
    expected = density[:, mean.argmin()] / density.sum(1)
    assert np.allclose(clean_probability(fitted, losses), expected)


def test_views_are_scaled_apart_and_modalities_fitted_apart():
    rng = np.random.default_rng(2)
    losses = np.full((3, 90), np.nan)
    losses[:2, :60] = rng.normal(1, 0.1, (2, 60)) + 4 * (np.arange(60) >= 40)
    losses[2, 60:] = rng.normal(1, 0.1, 30) + 4 * (np.arange(30) >= 20)
    found = confidences(losses, 0)
    assert (found[:2, 60:] == 0).all() and (found[2, :60] == 0).all()
    assert (found[:2, :40] > 0.9).all() and (found[:2, 40:60] < 0.1).all()
    stretched = losses * [[1], [7], [1]] + [[0], [3], [0]]
    assert np.allclose(confidences(stretched, 0), found)
    other = losses.copy()
    other[2] = other[2, ::-1][np.r_[30:90, 0:30]]  # other infrared losses
    assert np.array_equal(confidences(other, 0)[:2], found[:2])


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_equal_losses_are_no_reason_to_stop():
    found = confidences(np.ones((3, 8)), 0)
    assert np.isfinite(found).all()


def test_judging_is_of_every_row_and_needs_no_gradient(method):
    before = method.networks[0].head.neck.running_mean.clone()
    method.eval()
    method.begin_epoch(1, (noise_batch(step, draws=1) for step in range(2)))
    assert method.training and method.confidence.shape == (2, 3, 12)
    assert not method.confidence.requires_grad
    assert not torch.equal(method.confidence[0], method.confidence[1])
    assert not torch.equal(before, method.networks[0].head.neck.running_mean)
    assert (method.confidence[:, :2, 6:] == 0).all()
    assert (method.confidence[:, 2, :6] == 0).all()
    assert all(p.grad is None for p in method.parameters())


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_loss_that_is_no_number_ends_the_look(method, value, monkeypatch):
    """Else inf ends in scikit-learn's words, and nan is taken for no view."""
    looked = dart.view_losses

    def diverged(network, batch):
        losses = looked(network, batch)
        losses[2, 1] = value
        return losses

    monkeypatch.setattr(dart, "view_losses", diverged)
    sentence = f"identity loss became {value} in epoch 1, computed in float32: lower .*-p lr"
    with pytest.raises(FloatingPointError, match=sentence):
        method.begin_epoch(1, [noise_batch(0, draws=1)])


def test_the_warm_up_judges_nothing(method):
    held = method.confidence.clone()
    method.begin_epoch(0, iter(()))
    assert torch.equal(method.confidence, held)
    losses = method.losses(noise_batch(0), 0)
    assert losses["quadruplet_a"] == losses["quadruplet_b"] == 0
    for index, name in enumerate("ab"):
        parts, network = noise_batch(0).parts(2), method.networks[index]
        if index:  # the first network draws its views before
            method.networks[0].views(parts[0])
        visible, infrared, labels = network.views(parts[index])
        _, _, logits = network.head(network.net(visible, infrared))
        assert torch.equal(losses[f"identity_{name}"], identity_loss(logits, labels))


# --- two networks -------------------------------------------------------------------


def test_confidence_follows_rows_and_views(method):
    part = noise_batch(0).parts(2)[1]
    part.visible_rows, part.infrared_rows = ROWS[::-1].copy(), ROWS + 6
    held = method.confidence[1]
    expected = torch.cat([held[0, :6].flip(0), held[1, :6].flip(0), held[2, 6:]])
    assert torch.equal(method.batch_confidence(1, part), expected)


def test_each_network_learns_by_the_others_word(method):
    def losses() -> dict[str, torch.Tensor]:
        return method.losses(noise_batch(0), 1)

    before, judged = losses(), method.confidence.clone()
    for judge, taught, untaught in ((0, "b", "a"), (1, "a", "b")):
        method.confidence = judged.clone()
        method.confidence[judge] = 1 - judged[judge]
        after = losses()
        for kind in ("identity", "quadruplet"):
            assert after[f"{kind}_{untaught}"] == before[f"{kind}_{untaught}"]
        assert after[f"identity_{taught}"] != before[f"identity_{taught}"]


def test_losses_are_soft_identity_and_quadruplet(method):
    batch = half(noise_batch(0), 0)
    sure, network = method.batch_confidence(1, batch), method.networks[0]
    found = network_losses(network, batch, sure)
    again = half(noise_batch(0), 0)
    visible, infrared, labels = network.views(again)
    pooled, _, logits = network.head(network.net(visible, infrared))
    assert torch.equal(found[0], soft_identity_loss(logits, labels, sure))
    guesses = logits.argmax(1)
    expected = adaptive_quadruplet(pooled, labels, sure, guesses, again.generator)
    assert torch.equal(found[1], expected)


@pytest.mark.parametrize("index, name", [(0, "a"), (1, "b")])
def test_a_loss_touches_its_own_network_only(method, index, name):
    losses = method.losses(noise_batch(0), 1)
    (losses[f"identity_{name}"] + losses[f"quadruplet_{name}"]).backward()
    own, other = method.networks[index], method.networks[1 - index]
    assert all(p.grad is None for p in other.parameters())
    assert all(p.grad is not None for p in own.parameters() if p.requires_grad)


def test_the_networks_see_different_batches_and_start_apart(method):
    mine, other = (method.networks[i].head.classifier.weight for i in (0, 1))
    assert not torch.equal(mine, other)
    before = method.losses(noise_batch(0), 0)
    batch = noise_batch(0)
    batch.visible[6:] = 0  # the second draw
    after = method.losses(batch, 0)
    assert after["identity_a"] == before["identity_a"]
    assert after["identity_b"] != before["identity_b"]


def test_one_optimiser_is_as_good_as_two(method):
    twin = create("dart", 3, SMALL).train()
    twin.load_state_dict(method.state_dict())
    together = make_optimiser(method)
    apart = [make_optimiser(network) for network in twin.networks]
    for step in range(2):
        train_step(method, together, noise_batch(step), 1, "float32")
        losses = twin.losses(noise_batch(step), 1)
        for optimiser, name in zip(apart, "ab"):
            optimiser.zero_grad()
            (losses[f"identity_{name}"] + losses[f"quadruplet_{name}"]).backward()
            optimiser.step()
    for ours, theirs in zip(method.parameters(), twin.parameters()):
        assert torch.equal(ours, theirs)


def test_head_group_holds_both_necks_and_classifiers(method):
    full, _ = (set(map(id, g["params"])) for g in parameter_groups(method))
    heads = [network.head for network in method.networks]
    assert full == {id(h.neck.weight) for h in heads} | {
        id(h.classifier.weight) for h in heads
    }


@pytest.mark.parametrize("modality", ["visible", "infrared"])
def test_embed_is_the_mean_of_two_unit_features(method, modality):
    images = noise_batch(0).visible
    with torch.no_grad():
        found = method.eval().embed(images, modality)
        own = [network.embed(images, modality) for network in method.networks]
    assert torch.allclose(found.norm(dim=1), torch.ones(12))
    mean = (own[0] + own[1]) / 2
    assert torch.allclose(found * mean.norm(dim=1, keepdim=True), mean, atol=1e-6)
    assert not torch.allclose(own[0], own[1], atol=1e-2)


# --- states, noise and the loop -----------------------------------------------------


def test_a_checkpoint_carries_the_confidences(method, tmp_path):
    save_checkpoint(tmp_path / "c.pt", key="k", method=method.state_dict())
    twin = create("dart", 3, SMALL).train()
    assert twin.confidence.shape == (2, 3, 0)
    twin.load_state_dict(load_checkpoint(tmp_path / "c.pt", "k")["method"])
    assert torch.equal(twin.confidence, method.confidence)
    ours, theirs = (m.losses(noise_batch(0), 1) for m in (method, twin))
    assert ours == theirs


def test_noise_is_reproducible_by_seed(tree):
    split, _ = tree
    first, again, other = (with_noise(split, 0.5, seed) for seed in (1, 1, 2))
    assert first.train.equals(again.train) and not first.train.equals(other.train)
    wrong = first.train[first.train.label != split.train.label]
    counts, total = (t.modality.value_counts() for t in (wrong, split.train))
    assert (counts == np.ceil(0.5 * total)).all()
    assert first.train.identity.equals(split.train.identity)


def test_identities_short_of_images_are_left_out_only_under_noise(tree):
    split, _ = tree
    table = with_noise(split, 0.5, seed=4).train
    sampler = make_sampler(table, SMALL, seed=0, draws=2)
    counts = table.groupby(["label", "modality"]).size().unstack(fill_value=0)
    enough = counts.index[(counts >= SMALL.images).all(axis=1)]
    assert 3 <= len(enough) < len(counts)  # else this seed tests nothing
    assert set(sampler.labels[sampler.able]) == set(enough)
    for step in range(50):
        for rows in sampler.draw(0, step):
            assert set(table.label.to_numpy()[rows]) <= set(enough)
    clean = make_sampler(split.train, SMALL, seed=0)
    assert len(clean.able) == split.train.label.nunique()
    lacking = split.train[(split.train.label > 0) | (split.train.modality == "visible")]
    with pytest.raises(ValueError, match="Label 0 has 0 infrared images"):
        make_sampler(lacking, SMALL, seed=0)


def test_the_sweep_shows_every_image_in_full_batches(tree):
    run = start(tree, 0.5)
    run.table = run.table.iloc[:-7]  # fewer infrared than visible images
    assert run.table.modality.value_counts().to_list() == [18, 11]
    batches, again = list(run.sweep(1)), list(run.sweep(1))
    assert len(batches) == 3
    for batch, twin in zip(batches, again):
        assert len(batch.visible) == len(batch.infrared) == 6
        assert torch.equal(batch.visible, twin.visible)
    rows = np.concatenate([np.r_[b.visible_rows, b.infrared_rows] for b in batches])
    assert set(rows) == set(range(29))
    other = next(run.sweep(2))
    assert not np.array_equal(other.visible_rows, batches[0].visible_rows)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_noisy_run_through_the_loop(tree, precision):
    run = start(tree, 0.5, precision=precision)
    metrics = run.fit(progress=False)
    names = ["identity_a", "quadruplet_a", "identity_b", "quadruplet_b"]
    assert np.isfinite(metrics[names]).all(axis=None)
    assert (metrics.quadruplet_a > 0).tolist() == [False, True, True]
    assert np.allclose(metrics[names].sum(axis=1), metrics.loss)
    assert run.method.confidence.shape == (2, 3, len(run.table))
    features = embed(run.method, run.packed, run.table.modality, flip=False)
    assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)


def test_a_stopped_run_goes_on_and_ends_the_same(tree, tmp_path):
    whole = start(tree, 0.5, tmp_path / "whole")
    metrics = whole.fit(progress=False)
    for epochs in (1, 2, 3):  # killed after each epoch
        again = start(tree, 0.5, tmp_path / "killed", resume=True)
        assert again.epoch == epochs - 1
        begin = again.method.begin_epoch

        def begin_epoch(epoch, sweep, last=epochs, begin=begin):
            if epoch == last:
                raise KeyboardInterrupt
            begin(epoch, sweep)

        again.method.begin_epoch = begin_epoch
        try:
            again.fit(progress=False)
        except KeyboardInterrupt:
            pass
        assert again.epoch == epochs
    ours, theirs = (run.method.state_dict() for run in (whole, again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    drop = ["seconds"]
    resumed = pd.DataFrame(again.rows)
    assert metrics.drop(columns=drop).equals(resumed.drop(columns=drop))


def test_recipes_and_refusals():
    paper, pocket = DART.recipes["paper"], DART.recipes["pocket"]
    assert paper == replace(Recipe(), flip=False)
    assert paper.epochs == 100 and not pocket.flip
    with pytest.raises(ValueError, match="Unknown parameter 'stable'"):
        create("dart", 3, SMALL, stable=True)


# --- soft identity and quadruplet; invariances are in test_losses -----------------------


def test_soft_identity_loss_weighs_each_image():
    logits, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    each = torch.stack([identity_loss(logits[[i]], labels[[i]]) for i in range(3)])
    confidence = torch.tensor([1.0, 0.0, 0.25])
    torch.testing.assert_close(
        soft_identity_loss(logits, labels, confidence), (each[0] + each[2] / 4) / 3
    )


LINE = torch.tensor([[0.0], [1.0], [4.0], [6.0]])
PAIRS = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("sure", "predicted", "expected"),  # what stands before the margin, by sure anchor
    [
        # Both true, everywhere.
        ([1, 1, 1, 1], [0, 0, 1, 1], [1 - 4, 1 - 3, 2 - 3, 2 - 5]),
        # Anchor 0: positive false, and no sure spare, so s = j.
        ([1, 0, 1, 1], [0, 0, 0, 0], [1 - (1 + 4) / 2, 2 - 3, 2 - 5]),
        # Anchors 0 and 1: negative false, s = 3. Anchor 3: positive false, s = j.
        ([1, 1, 0, 1], [0, 0, 0, 0], [2.5 - 6, (1 + 3) / 2 - 5, 2 - (2 + 5) / 2]),
        # Both false: the roles are swapped.
        ([1, 0, 0, 0], [0, 0, 0, 0], [4 - 1]),
        # Positive false; the negative is doubtful but not predicted as the anchor's.
        ([1, 0, 0, 0], [0, 0, 1, 1], [1 - (1 + 4) / 2]),
    ],
)
def test_quadruplet_by_hand(sure, predicted, expected):
    found = adaptive_quadruplet(
        LINE,
        PAIRS,
        torch.tensor(sure).float(),
        torch.tensor(predicted),
        torch.Generator().manual_seed(0),
        margin=10.0,
    )
    assert found.item() == pytest.approx(10 + np.mean(expected))


def test_quadruplet_takes_a_sure_spare_positive():
    line = torch.tensor([[0.0], [1.0], [3.0], [4.0], [50.0]])
    labels, confidence = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1.0, 0, 1, 0, 0])
    seen = set()
    for seed in range(30):
        found = adaptive_quadruplet(
            line, labels, confidence, labels, torch.Generator().manual_seed(seed), 10.0
        )
        seen.add(round(found.item(), 4))
    # Anchors 0 and 2, each with j sure or j = 1 false; s is the other sure image, or
    # once in 32 the false one again.
    first = [3 - 4, 3 - (1 + 4) / 2, 1 - (1 + 4) / 2]
    third = [3 - 1, 3 - (2 + 1) / 2, 2 - (2 + 1) / 2]
    allowed = {round(10 + (x + y) / 2, 4) for x in first for y in third}
    usual = {round(10 + (x + y) / 2, 4) for x in first[:2] for y in third[:2]}
    assert usual <= seen <= allowed


def test_quadruplet_ends_with_the_tenth_negative_tried():
    line = torch.tensor([0.0, 1.0, *range(2, 14)])[:, None]  # negatives at 2 to 13
    labels = torch.tensor([0, 0] + [1] * 12)
    confidence = (labels == 0).float()
    found = adaptive_quadruplet(
        line, labels, confidence, 0 * labels, torch.Generator().manual_seed(0), 20.0
    )
    # Nearest at 2; ten tries at 3 to 12, none sure: s at 12. The same from anchor 1.
    expected = [(1 + 2) / 2 - 12, (1 + 1) / 2 - 11]
    assert found.item() == pytest.approx(20 + np.mean(expected))


def naive_anchor(i, features, labels, sure, predictions, uniform, margin):
    """The case and the loss of one anchor, Eq. (4), one try after the other."""
    d = lambda other: (features[i] - features[other]).norm()
    others = [n for n in range(len(labels)) if n != i]
    positives = [n for n in others if labels[n] == labels[i]]
    negatives = sorted((n for n in others if labels[n] != labels[i]), key=d)
    draws = [positives[int(u * len(positives))] for u in uniform]
    j, k = draws[0], negatives[0]
    false_positive = not sure[j]
    false_negative = not sure[k] and predictions[k] == labels[i]
    if false_positive and false_negative:
        case, gap = "both false", d(k) - d(j)
    elif false_positive:
        s = next((n for n in draws[1:] if sure[n]), draws[-1])
        case, gap = "positive false", d(s) - (d(j) + d(k)) / 2
    elif false_negative:
        tries = negatives[1:11] or [k]
        s = next((n for n in tries if sure[n]), tries[-1])
        case, gap = "negative false", (d(j) + d(k)) / 2 - d(s)
    else:
        case, gap = "both true", d(j) - d(k)
    return case, (gap + margin).clamp(min=0)


def test_quadruplet_by_plain_loops():
    """Five noisy batches, and one with so few negatives that the tries run out."""
    cases = set()
    for key in range(6):
        people, images = (3, 8) if key < 5 else (2, 2)
        labels, draw = torch.arange(people).repeat_interleave(images), torch_generator(key)
        n = len(labels)
        sure = torch.rand(n, generator=draw, dtype=torch.float64)
        predictions = torch.randint(people, (n,), generator=draw)
        features = torch.randn(n, 3, generator=draw, dtype=torch.float64).requires_grad_()
        uniform = torch.rand(n, 6, generator=torch_generator("draws", key))
        anchors = [
            naive_anchor(i, features, labels, sure >= 0.5, predictions, uniform[i], 0.3)
            for i in range(n)
            if sure[i] >= 0.5
        ]
        cases |= {case for case, _ in anchors}
        slow = torch.stack([loss for _, loss in anchors]).mean()
        fast = adaptive_quadruplet(
            features, labels, sure, predictions, torch_generator("draws", key)
        )
        torch.testing.assert_close(fast, slow)
        gradients = [torch.autograd.grad(loss, features)[0] for loss in (fast, slow)]
        torch.testing.assert_close(*gradients)
    assert cases == {"both true", "positive false", "negative false", "both false"}
