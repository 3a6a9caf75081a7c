"""Speeds of this machine's processor, one thread: make bench [NAMES=...].

Each case is a pair: what others do, and what this package does. The two take turns, and
what counts is processor time, so that another program beside it disturbs little. The
record goes to runs/bench/<moment>.json.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision import transforms

from afen import augment
from afen.batches import Batch
from afen.core import atomic_path, keyed_rng, project_root, torch_generator
from afen.evaluation import evaluate, evaluate_naive
from afen.method import Recipe, create, method_class
from afen.records import code_revision, cpu_name, package_versions
from afen.training import make_optimiser, train_step

Pair = tuple[Callable[[], object], Callable[[], object]]


def ranking(n_query: int, n_gallery: int, protocol: str, part: int) -> Pair:
    """Random distances: the loop over a `part`-th of the queries, and all at once."""
    rng, n_ids = keyed_rng("bench", protocol), 206 if protocol == "regdb" else 96
    case = {
        "distances": rng.random((n_query, n_gallery), dtype=np.float32),
        "query_ids": np.arange(n_query) % n_ids,
        "gallery_ids": np.arange(n_gallery) % n_ids,
        "query_cams": rng.choice([3, 6], n_query),
        "gallery_cams": rng.choice([1, 2, 4, 5], n_gallery),
    }
    query = ("distances", "query_ids", "query_cams")
    few = {k: v[::part] if k in query else v for k, v in case.items()}
    return (
        lambda: evaluate_naive(**few, protocol=protocol),
        lambda: evaluate(**case, protocol=protocol),
    )


def views() -> Pair:
    """96 views at 288 x 144: image by image through PIL, and the batch at once."""
    rng = keyed_rng("bench", "views")
    pixels = rng.integers(0, 256, (64, 288, 144, 3), dtype=np.uint8)
    pictures = [transforms.functional.to_pil_image(image) for image in pixels]
    one = transforms.Compose([
        transforms.Pad(10),
        transforms.RandomCrop((288, 144)),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(augment.MEAN, augment.STD),
        transforms.RandomErasing(0.5, augment.AREA, augment.ASPECT, augment.FILL),
    ])
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    generator = torch_generator("bench")
    visible, infrared = batch[:32], batch[32:]

    def ours() -> list[torch.Tensor]:
        weak, channel = augment.weak_view, augment.channel_view
        made = [view(visible, generator) for view in (weak, channel)]
        return [*made, augment.infrared_view(infrared, generator)]

    return lambda: torch.stack([one(p) for p in [*pictures, *pictures[:32]]]), ours


def made_batch(recipe: Recipe) -> Batch:
    """Eight visible and eight infrared images of four people: 24 views."""
    size, labels = (2, 8, 3, recipe.height, recipe.width), torch.arange(8) // 2
    images, rows = torch.randint(0, 256, size, dtype=torch.uint8), np.arange(8)
    return Batch(*images, labels, labels, rows, rows, None, None, torch_generator("bench"))


def step_of(name: str) -> Callable[[], object]:
    """One training step of a method at the paper's size, 24 views."""
    recipe = replace(method_class(name).recipes["paper"], weights="none")
    method = create(name, 395, recipe).to(memory_format=torch.channels_last).train()
    optimiser, batch = make_optimiser(method), made_batch(recipe)
    return lambda: train_step(method, optimiser, batch, 0)


def plain_step() -> Callable[[], object]:
    """One step of torchvision's ResNet-50 with the last stride 1, 24 images."""
    network = torchvision.models.resnet50(num_classes=395)
    network.layer4[0].conv2.stride = network.layer4[0].downsample[0].stride = (1, 1)
    network = network.to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=5e-4)
    images = torch.randn(24, 3, 288, 144).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(24)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(network(images), labels).backward()
        optimiser.step()

    return step


CASES: dict[str, tuple[Callable[[], Pair], float]] = {  # what, and the loop's part
    "SYSU-MM01, single-shot": (lambda: ranking(3803, 301, "sysu", 10), 10),
    "SYSU-MM01, multi-shot": (lambda: ranking(3803, 3010, "sysu", 100), 100),
    "RegDB, one direction": (lambda: ranking(2060, 2060, "regdb", 50), 50),
    "96 views": (views, 1),
    "step of CAJ": (lambda: (plain_step(), step_of("caj")), 1),
    "step of AFEN": (lambda: (step_of("caj"), step_of("afen")), 1),
}


def seconds(pair: Pair, repeats: int) -> tuple[list[float], list[float]]:
    """Processor seconds of both, in turn, after a round that warms up."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for run, column in zip(pair, times):
            begun = time.process_time()
            run()
            if turn:
                column.append(time.process_time() - begun)
    return times


def measure(name: str, repeats: int = 3) -> dict[str, object]:
    """One case: medians in seconds, their ratio, and every time."""
    make, part = CASES[name]
    before, after = seconds(make(), repeats)
    before = [part * value for value in before]
    medians = statistics.median(before), statistics.median(after)
    return {
        "case": name,
        "other": medians[0],
        "ours": medians[1],
        "times_faster": medians[0] / medians[1],
        "part": part,  # the loop ran over this share of the queries: 1 / part
        "other_each": before,
        "ours_each": after,
    }


def main(names: list[str]) -> None:
    """Measure the named cases, or all, one after the other, and write a record."""
    torch.set_num_threads(1)
    record = {
        "schema": 1,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": f"cpu: {cpu_name()}",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(terse=True),
        "threads": 1,
        "code": code_revision(),
        "packages": package_versions(),
        "rows": [],
    }
    for name in names or CASES:
        row = measure(name)
        print("{case}: {other:.3g} s, ours {ours:.3g} s, {times_faster:.3g}x".format(**row))
        record["rows"].append(row)
    moment = record["started"][:19].replace(":", "")
    with atomic_path(project_root() / "runs" / "bench" / f"{moment}.json") as path:
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
