"""A step of each method in three precisions: finite, and as near as rounding allows."""

from dataclasses import replace

import torch

from afen import runs
from afen.batches import batches
from afen.core import seed_everything
from afen.method import create
from afen.training import autocast, make_sampler

from .long_kills import METHODS, TINY, make_tree

DOUBLE = torch.float64
BOUNDS = {"float32": 1e-3, "bfloat16": 0.2}  # of losses, relative; a loss below 1 counts as 1


def to_double(module, inputs):
    """What goes into a module, as float64."""
    wide = lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
    return tuple(map(wide, inputs))


def step(method, plan, data, precision):
    """The losses of a first batch and the norm of their gradient, in a precision."""
    seed_everything(0)
    n = data.split.train.identity.nunique()
    network = create(method, n, plan.recipe, **plan.options).train()
    sampler = make_sampler(data.split.train, plan.recipe, 0, network.draws)
    stream = batches(data.train, data.split.train, sampler, 0, 0, torch.device("cpu"), 0)
    batch = next(stream)
    stream.close()
    if precision == "float64":
        network.double()
        for module in network.modules():
            module.register_forward_pre_hook(to_double)
        precision = "float32"  # no autocast
    torch.manual_seed(1)
    with autocast(torch.device("cpu"), precision):
        losses = network.losses(batch, 0)
    sum(losses.values()).backward()
    squares = [p.grad.double().square().sum() for p in network.parameters() if p.grad is not None]
    norm = torch.stack(squares).sum().sqrt().item()
    return {k: v.item() for k, v in losses.items()}, norm


def compare(method, plan, data):
    """Losses and gradients of a method in each precision, and how far they are apart."""
    exact, norm = step(method, plan, data, "float64")
    row = {"method": method, "losses": len(exact), "gradient": norm}
    for precision in BOUNDS:
        losses, other = step(method, plan, data, precision)
        apart = [abs(losses[k] - v) / max(1.0, abs(v)) for k, v in exact.items()]
        row |= {precision: max(apart), f"{precision}_gradient": abs(other - norm) / norm}
    return row


def numerics(folder, seed=0, methods=METHODS):
    """Every method's step; the largest relative distances to float64, and what is wrong."""
    tree, rows, faults = make_tree(folder / "tree"), [], []
    for method in methods:
        given = TINY | {"method": method, "root": str(tree), "seed": seed}
        plan = runs.make_plan(runs.DEFAULTS | given)
        plan = replace(plan, recipe=replace(plan.recipe, weights="none"))
        row = compare(method, plan, runs.open_data(plan))
        rows.append({k: v if isinstance(v, int | str) else float(f"{v:.3g}")
                     for k, v in row.items()})  # fmt: skip
        faults += [
            f"{method} in {name} is {row[name]:.2g} from float64"
            for name, bound in BOUNDS.items() if not row[name] <= bound
        ]  # fmt: skip
    native = torch.backends.cpu.get_cpu_capability()
    return {"capability": native, "bounds": BOUNDS, "faults": faults, "each": rows}
