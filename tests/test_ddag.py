"""DDAG: the graph's edges and weight, checkpoints, features of either kind.

The released modules' golden numbers and the loops are asserted on the page itself.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from afen.batches import Batch
from afen.core import seed_everything, torch_generator
from afen.method import Recipe, create
from afen.methods.ddag import CGSA, DDAG, GraphAttention
from afen.training import (
    load_checkpoint,
    make_optimiser,
    parameter_groups,
    save_checkpoint,
    train_step,
)

SMALL = Recipe(height=48, width=24, depth=18, weights="none", pad=2, lr=0.01)
LABELS = torch.arange(3).repeat_interleave(2)


def noise_batch(step: int) -> Batch:
    """Two visible and two infrared noise images of each of three identities."""
    generator = torch_generator("test_ddag", step)
    shape = (2, 6, 3, SMALL.height, SMALL.width)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    rows = np.arange(6)
    return Batch(*images, LABELS, LABELS, rows, rows, None, None, generator)


def train(method: DDAG, epoch: int, precision: str = "float32") -> list[dict]:
    """The losses of two steps of an epoch."""
    method.train().begin_epoch(epoch, iter(()))
    optimiser, rows = make_optimiser(method), []
    for step in range(2):
        torch.manual_seed(step)
        rows.append(train_step(method, optimiser, noise_batch(step), epoch, precision))
    return [{name: loss.item() for name, loss in row.items()} for row in rows]


@pytest.fixture
def method() -> DDAG:
    """A small untrained DDAG."""
    seed_everything(0)
    return create("ddag", 3, SMALL)


def test_a_lone_image_is_its_own_only_neighbour():
    layer = GraphAttention(10, 6, heads=1).eval()
    x = torch.randn(3, 10, generator=torch_generator("lone"))
    assert torch.allclose(layer(x, torch.eye(3).bool()), F.elu(x @ layer.W[0]))


def test_dropout_acts_in_training_only():
    seed_everything(0)
    graph, x = CGSA(16, 3), torch.randn(6, 16)
    assert not torch.equal(graph(x, LABELS), graph(x, LABELS))
    graph.eval()
    assert torch.equal(graph(x, LABELS), graph(x, LABELS))


def test_graph_weight_follows_the_epoch_before(method):
    first = train(method, 0)
    assert [row["graph"] for row in first] == [0, 0]
    second = train(method, 1)
    sums = [row["identity"] + row["triplet"] + row["part"] for row in first]
    assert method.graph_weight.item() == pytest.approx(1 / (1 + np.mean(sums)))
    assert all(row["graph"] > 0 for row in second)
    third = [row["identity"] + row["triplet"] + row["part"] for row in second]
    method.begin_epoch(2, iter(()))
    assert method.graph_weight.item() == pytest.approx(1 / (1 + np.mean(third)))
    method.begin_epoch(0, iter(()))
    assert method.graph_weight == 0


def test_the_weight_scales_the_graph_loss_and_nothing_else(method):
    def losses(weight: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        method.graph_weight.fill_(weight)
        return method.losses(noise_batch(0), 1)

    half, whole = losses(0.5), losses(1.0)
    assert torch.allclose(2 * half.pop("graph"), whole.pop("graph"))
    assert half == whole


def test_graph_learns_once_it_has_a_weight(method):
    for weight in (0.0, 0.5):
        method.zero_grad()
        method.graph_weight.fill_(weight)
        sum(method.losses(noise_batch(0), 1).values()).backward()
        grown = [p.grad.abs().sum() > 0 for p in method.cgsa.parameters()]
        assert grown == [weight > 0] * 4


def test_a_checkpoint_carries_the_running_mean(method, tmp_path):
    train(method, 0)
    save_checkpoint(tmp_path / "c.pt", key="k", method=method.state_dict())
    twin = create("ddag", 3, SMALL)
    twin.load_state_dict(load_checkpoint(tmp_path / "c.pt", "k")["method"])
    assert train(method, 1) == train(twin, 1)


def test_bfloat16_losses_stay_finite(method):
    rows = train(method, 0, "bfloat16") + train(method, 1, "bfloat16")
    assert all(np.isfinite(loss) for row in rows for loss in row.values())


def test_head_group_holds_all_but_the_backbone(method):
    full, tenth = (set(map(id, g["params"])) for g in parameter_groups(method))
    assert tenth == {id(p) for p in method.net.parameters()}
    frozen = {id(method.head.neck.bias), id(method.iwpa.neck.bias)}
    assert not frozen & (full | tenth)
    rest = {id(p) for p in method.parameters()} - tenth - frozen
    assert full == rest


@pytest.mark.parametrize("modality", ["visible", "infrared"])
def test_embed_gives_unit_features_of_either_kind(method, modality):
    train(method, 0)
    images = noise_batch(0).visible
    with torch.no_grad():
        attention = method.eval().embed(images, modality)
        method.options["feature"] = "global"
        plain = method.embed(images, modality)
    for feature in (attention, plain):
        assert feature.shape == (6, 512)
        assert torch.allclose(feature.norm(dim=1), torch.ones(6))
    assert not torch.allclose(attention, plain, atol=1e-2)


def test_pooling_is_the_average(method):
    maps = torch.randn(2, 512, 3, 2, generator=torch_generator("pool"))
    assert torch.allclose(method.head(maps)[0], maps.mean((2, 3)), atol=1e-6)


def test_recipes_and_refusals():
    paper = DDAG.recipes["paper"]
    assert paper == replace(Recipe(), epochs=81, erasing=0.0, flip=False)
    assert not DDAG.recipes["pocket"].flip
    with pytest.raises(ValueError, match="feature"):
        create("ddag", 3, SMALL, feature="graph")
