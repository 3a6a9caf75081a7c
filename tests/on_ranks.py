"""A step of every method by one process and by several: how far apart they are.

    python tests/on_ranks.py OUTPUT

It forks two processes, with what torchrun would tell them, so that torch is imported once.
"""

import json
import os
import socket
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from timm.layers import DropPath
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from afen import backbone, ranks
from afen.batches import Batch
from afen.method import create, method_class, method_names
from afen.training import make_optimiser, train_step

LATE = 8  # an epoch after every warm-up and first phase
CASES = [(name, 0) for name in method_names()] + [("dart", LATE), ("pmt", LATE)]
CPU = torch.device("cpu")
SMALLER = {18: lambda weights: ResNet(BasicBlock, [1, 2, 2, 1])}  # half the weights


def made_up_batch(recipe, draws):
    """A batch of noise with as many identities and images as the recipe says."""
    generator = torch.Generator().manual_seed(0)
    n = recipe.identities * recipe.images * draws
    size = n, 3, recipe.height, recipe.width
    labels = torch.arange(recipe.identities).repeat_interleave(recipe.images).repeat(draws)
    images = [torch.randint(0, 256, size, generator=generator).byte() for _ in "vi"]
    scale = torch.tensor([recipe.width, recipe.height, 1.0])
    joints = [torch.rand(n, 17, 3, generator=generator) * scale for _ in "vi"]
    return Batch(*images, labels, labels, *[np.arange(n)] * 2, *joints, generator)


def in_float64(method):
    """The method in double precision, whatever the precision of its views."""
    for layer in method.double().modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, views: (views[0].double(),))
    return method


def prepared(name):
    """A small method, and a batch for it."""
    torch.manual_seed(0)
    pocket = method_class(name).recipes["pocket"]
    size = {"height": 32, "width": 16, "identities": 4, "images": 2, "precision": "float32"}
    recipe = replace(pocket, **size)
    method = in_float64(create(name, recipe.identities, recipe)).train()
    batch = made_up_batch(recipe, method.draws)
    if name == "dart":
        method.confidence = torch.rand(2, 3, len(batch.visible)).double()
    if name == "spot":  # without its cast to single precision
        method.fuse = lambda a, b: torch.lerp(b, a, method.balance.sigmoid())
    if name == "ddag":
        method.graph_weight += 0.5
    for layer in method.modules() if name == "pmt" else ():  # each process draws its own
        if isinstance(layer, (nn.Dropout, DropPath)):
            setattr(layer, "p" if isinstance(layer, nn.Dropout) else "drop_prob", 0.0)
    return method, batch


def step(name, epoch):
    """Losses, gradients, and the state after a step."""
    method, batch = prepared(name)
    ranks.synchronise(method)
    losses = train_step(method, make_optimiser(method), batch, epoch, "float32")
    parameters = method.named_parameters()
    gradients = {k: p.grad for k, p in parameters if p.grad is not None}
    return {"losses": losses, "gradients": gradients, "state": method.state_dict()}


def gap(one, several):
    """The largest distance between tensors of one name, relative where they are large."""
    assert one.keys() == several.keys()
    norms = [(v.double().norm(), (v - several[k]).double().norm()) for k, v in one.items()]
    return max(float(apart / max(1.0, size)) for size, apart in norms)


def gaps(name, epoch):
    """How far the step of all processes is from that of one, by what is compared."""
    several = step(name, epoch)
    if not ranks.is_first():
        return {}
    with mock.patch.object(ranks, "processes", lambda: 1):
        one = step(name, epoch)
    return {kind: gap(one[kind], several[kind]) for kind in one}


def compare(rank, port, output):
    """Compare all cases, as one of two processes."""
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    of = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in (place | of).items()}
    with ranks.together(CPU), mock.patch.dict(backbone.DEPTHS, SMALLER):
        outcomes = {f"{name}-{epoch}": gaps(name, epoch) for name, epoch in CASES}
        with mock.patch.object(ranks, "synced_forward", lambda n, x: type(n).forward(n, x)):
            outcomes["without gathered statistics"] = gaps("agw", 0)
        if ranks.is_first():
            Path(output).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = get_context("fork").Process
    pair = [fork(target=compare, args=(rank, port, sys.argv[1])) for rank in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    sys.exit(any(process.exitcode for process in pair))
