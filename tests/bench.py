"""Speeds of this machine's processor: make bench [NAMES="..."], under a quarter of an hour.

What is compared takes turns, and what counts is processor time on one thread, so that other
programs disturb little; the machine's load is noted all the same. The record, one row per
variant, goes to runs/bench/<moment>.json; copied to data/records/speed, it is read by
nbs/speed.ipynb.
"""

import contextlib
import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
import psutil
import torch
import torchvision
from torch import Tensor, nn
from torchvision import transforms

from afen import augment
from afen.batches import Batch
from afen.core import atomic_path, cpu_name, keyed_rng, project_root, torch_generator
from afen.evaluation import RANKS, Scores, evaluate, evaluate_naive
from afen.method import Method, Recipe, create, method_class
from afen.records import code_revision, package_versions
from afen.training import make_optimiser, train_step

Run = Callable[[], object]
LAST = torch.channels_last


@dataclass(frozen=True)
class Case:
    """Variants of one piece of work, timed in turn."""

    make: Callable[[], dict[str, Run]]  # what to run, by name
    parts: Mapping[str, float] = field(default_factory=dict)  # runs 1 / part of the work
    repeats: int = 3  # after a turn that warms up


# --- ranking -----------------------------------------------------------------------------


def rank_in_loop(
    distances: np.ndarray,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    query_cams: np.ndarray,
    gallery_cams: np.ndarray,
    protocol: str,
) -> Scores:
    """As released evaluations go about it, written anew.

    All distances are ordered; then query by query images are dropped, identities made
    unique, hits summed up, and the precision is divided out rank by rank in Python.
    """
    order, measured = np.argsort(distances, axis=1), []
    for row, identity, cam in zip(order, query_ids, query_cams):
        if protocol == "sysu":
            row = row[~((cam == 3) & (gallery_cams[row] == 2))]
        ids = gallery_ids[row]
        hits = (ids == identity).astype(np.int32)
        if not hits.any():
            continue
        total = hits.cumsum()
        precision = np.array([count / (k + 1.0) for k, count in enumerate(total)])
        last = np.flatnonzero(hits)[-1]
        if protocol == "sysu":  # the curve counts identities, the precision images
            ids = np.array([ids[i] for i in sorted(np.unique(ids, return_index=True)[1])])
        curve = (ids == identity).cumsum().clip(max=1)
        curve = np.pad(curve[:RANKS], (0, max(0, RANKS - len(curve))), mode="edge")
        ap = (precision * hits).sum() / hits.sum()
        measured.append((curve, ap, total[last] / (last + 1.0)))
    cmc, precisions, penalties = (np.mean(column, axis=0) for column in zip(*measured))
    n = len(measured)
    return Scores(cmc, float(precisions), float(penalties), n, len(query_ids) - n)


def trial(n_query: int, n_gallery: int, protocol: str, number: int) -> dict[str, Any]:
    """Random distances, and whom they are between."""
    rng, n_ids = keyed_rng("bench", protocol, number), 206 if protocol == "regdb" else 96
    return {
        "distances": rng.random((n_query, n_gallery), dtype=np.float32),
        "query_ids": np.arange(n_query) % n_ids,
        "gallery_ids": np.arange(n_gallery) % n_ids,
        "query_cams": rng.choice([3, 6], n_query),
        "gallery_cams": rng.choice([1, 2, 4, 5], n_gallery),
        "protocol": protocol,
    }


def ranking(
    n_query: int, n_gallery: int, protocol: str, trials: int, part: int
) -> dict[str, Run]:
    """The loops over a `part`-th of all queries, and `trials` trials at once."""
    cases = [trial(n_query, n_gallery, protocol, t) for t in range(trials)]
    step = max(1, part // trials)  # the loops see every `step`-th query of one trial
    query = ("distances", "query_ids", "query_cams")
    few = {k: v[::step] if k in query else v for k, v in cases[0].items()}
    return {
        "released algorithm": partial(rank_in_loop, **few),
        "oracle": partial(evaluate_naive, **few),
        "ours": lambda: [evaluate(**case) for case in cases][0],
        "floor": lambda: [np.sort(c["distances"].view(np.uint32), axis=1) for c in cases],
    }


def ranking_case(n_query: int, n_gallery: int, protocol: str, trials: int, part: int) -> Case:
    """A ranking whose loops run over a `part`-th of it."""
    make = partial(ranking, n_query, n_gallery, protocol, trials, part)
    return Case(make, {"released algorithm": part, "oracle": part})


# --- augmentation ------------------------------------------------------------------------


def views() -> dict[str, Run]:
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

    def theirs() -> list[Tensor]:
        halves = pictures[:32], pictures[:32], pictures[32:]
        weak, channel, other = (torch.stack([*map(one, half)]) for half in halves)
        return [torch.cat([weak, channel]), other]

    def ours() -> list[Tensor]:  # as CAJ has them
        weak, channel = augment.weak_view, augment.channel_view
        made = torch.cat([view(visible, generator) for view in (weak, channel)])
        return [made, augment.infrared_view(infrared, generator)]

    whole = torch.cat([visible, batch]).contiguous()
    return {
        "PIL, image by image": theirs,
        "ours": ours,
        "floor": lambda: whole.float(),  # every byte is read and every number written
    }


# --- networks ----------------------------------------------------------------------------


def paper_method(name: str, **change: Any) -> Method:
    """A method at the paper's size with weights from chance."""
    recipe = replace(method_class(name).recipes["paper"], weights="none")
    options = change.pop("options", {})
    identities = change.pop("n_identities", 395)
    return create(name, identities, replace(recipe, **change), **options)


def made_batch(recipe: Recipe, people: int = 4) -> Batch:
    """Two visible and two infrared images of each person: six views."""
    n = 2 * people
    size, labels = (2, n, 3, recipe.height, recipe.width), torch.arange(n) // 2
    images, rows = torch.randint(0, 256, size, dtype=torch.uint8), np.arange(n)
    return Batch(*images, labels, labels, rows, rows, None, None, torch_generator("bench"))


def step_of(
    method: Method, people: int = 4, layout: torch.memory_format = LAST
) -> Run:
    """One training step in float32, six views of each person."""
    method = method.to(memory_format=layout).train()
    optimiser, batch = make_optimiser(method), made_batch(method.recipe, people)
    return lambda: train_step(method, optimiser, batch, 0, "float32")


def plain_resnet() -> nn.Module:
    """torchvision's ResNet-50 with the last stride 1."""
    network = torchvision.models.resnet50(num_classes=395)
    network.layer4[0].conv2.stride = network.layer4[0].downsample[0].stride = (1, 1)
    return network.to(memory_format=LAST)


def plain_step() -> Run:
    """One step of `plain_resnet`, 24 images that are floats already."""
    network = plain_resnet().train()
    optimiser = torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=5e-4)
    images = torch.randn(24, 3, 288, 144).contiguous(memory_format=LAST)
    labels = torch.arange(24)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(network(images), labels).backward()
        optimiser.step()

    return step


EDGE = 2048  # of the square matrices whose product says what the processor can do


def matrix_product() -> Run:
    """A product of two square matrices: EDGE ** 3 multiply-adds."""
    factors = torch.randn(2, EDGE, EDGE)
    return lambda: factors[0] @ factors[1]


def steps() -> dict[str, Run]:
    """Training steps of 24 views at 288 x 144."""
    return {
        "plain ResNet-50": plain_step(),
        "CAJ": step_of(paper_method("caj")),
        "AFEN": step_of(paper_method("afen")),
        "AFEN without MECS": step_of(paper_method("afen", options={"mecs": "none"})),
        "AFEN without FEM": step_of(paper_method("afen", options={"fem": "none"})),
        "CAJ, channels first": step_of(paper_method("caj"), 4, torch.contiguous_format),
        "matrix product": matrix_product(),
    }


@torch.no_grad()
def embeddings() -> dict[str, Run]:
    """Features of 16 images at 288 x 144: torchvision's ResNet-50, and our ResNet-50."""
    none = {"mecs": "none", "fem": "none"}
    ours = paper_method("afen", options=none).to(memory_format=LAST).eval()
    plain = plain_resnet().eval()
    plain.fc = nn.Identity()
    pixels = torch.randint(0, 256, (16, 3, 288, 144), dtype=torch.uint8)
    pixels = pixels.contiguous(memory_format=LAST)
    images = augment.normalise(augment.to_float(pixels)).contiguous(memory_format=LAST)
    return {
        "torchvision": torch.no_grad()(lambda: plain(images)),
        "ours": torch.no_grad()(lambda: ours.embed(pixels, "visible")),
        "matrix product": matrix_product(),
    }


def medians() -> dict[str, Run]:
    """The lower median over the positions of MECS's map, 24 views: [24, 512, 36 * 18]."""
    maps = torch.randn(24, 512, 36 * 18, generator=torch_generator("bench")).relu_()
    middle = (maps.shape[-1] - 1) // 2
    return {
        "median": lambda: maps.median(-1).values,
        "kthvalue": lambda: maps.kthvalue(middle + 1, -1).values,
        "sort": lambda: maps.sort(dim=-1).values[..., middle],
        "sort, stable": lambda: maps.sort(dim=-1, stable=True).values[..., middle],
        "topk": lambda: maps.topk(middle + 1, largest=False).values[..., -1],
    }


def optimisers() -> dict[str, Run]:
    """The update of AFEN's weights by SGD: one by one, in lists, in one kernel."""
    kinds = {"one by one": {}, "in lists": {"foreach": True}, "fused": {"fused": True}}
    variants = {}
    for name, kind in kinds.items():
        weights = [nn.Parameter(p.detach().clone()) for p in paper_method("afen").parameters()]
        for weight in weights:
            weight.grad = torch.full_like(weight, 1e-3)
        rest = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
        variants[name] = torch.optim.SGD(weights, 0.1, **rest, **kind).step
    return variants


def pocket_step() -> dict[str, Run]:
    """A step of `make demo`: 64 images of 64 x 32, and what its network alone takes."""
    recipe = method_class("afen").recipes["pocket"]
    none = {"mecs": "none", "fem": "none"}
    people = recipe.identities
    return {
        "AFEN": step_of(create("afen", 256, recipe), people),
        "without MECS and FEM": step_of(create("afen", 256, recipe, **none), people),
    }


# --- search ------------------------------------------------------------------------------

BLOCK = 2**16  # gallery images at a time


def exact_search(
    query: Tensor,  # [Q, D], rows of length one
    gallery: Tensor,  # [G, D], rows of length one
    k: int,
) -> Tensor:
    """The rows of the k nearest gallery images, int64 [Q, k], a block at a time."""
    nearness, rows = query.new_empty(len(query), 0), torch.empty(len(query), 0).long()
    for start in range(0, len(gallery), BLOCK):
        near = query @ gallery[start : start + BLOCK].T  # [Q, <= BLOCK]
        values, columns = near.topk(min(k, near.shape[1]))
        nearness, rows = torch.cat([nearness, values], 1), torch.cat([rows, columns + start], 1)
        nearness, best = nearness.topk(min(k, nearness.shape[1]))
        rows = rows.gather(1, best)
    return rows


WIDTH = 256  # of the features: time and memory go with it
IMAGES = 10  # of each person in the gallery, and how many nearest are asked for


def crowd(n_gallery: int, n_query: int) -> tuple[Tensor, Tensor]:
    """Features of people, IMAGES of each: a point in space, and noise around it."""
    generator = torch_generator("bench", n_gallery)
    people = torch.randn(max(1, n_gallery // IMAGES), WIDTH, generator=generator)
    sides = []
    for n in (n_query, n_gallery):
        noise = torch.randn(n, WIDTH, generator=generator)
        noise += people[torch.arange(n) % len(people)]
        sides.append(noise.div_(noise.norm(dim=1, keepdim=True)))
    return sides[0], sides[1]


# --- growth ------------------------------------------------------------------------------


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """The most memory that the block held beyond what there was, in MB: one number."""
    gc.collect()  # what goes during the block would be subtracted
    with contextlib.suppress(OSError, AttributeError):  # and what malloc kept would not count
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    process, done, most = psutil.Process(), threading.Event(), [0.0]
    before = process.memory_info().rss

    def look() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], (process.memory_info().rss - before) / 1e6)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


def point(case: str, variant: str, x: float, run: Run, repeats: int = 2) -> dict[str, Any]:
    """A row of a curve: the least seconds of `repeats` runs, and the memory of the first."""
    times = []
    with peak_memory() as most:
        times.append(timed(run))
    times += [timed(run) for _ in range(repeats - 1)]
    row = {"case": case, "variant": variant, "x": x, "seconds": min(times)}
    return row | {"megabytes": round(most[0], 1), "each": times, "load": os.getloadavg()[0]}


STEP_SIZES = {  # of a curve, AFEN's step at each of its points
    "views": [{"people": n} for n in (2, 4, 8)],
    "height": [{"height": h, "width": h // 2} for h in (72, 144, 216, 288)],
    "identities": [{"n_identities": 10**k} for k in (2, 3, 4, 5)],
}


def growth_of_step() -> Iterator[dict[str, Any]]:
    """AFEN's step against views, height of the images and identities of the training set.

    What is not varied: 24 views of 144 x 72 (12 views, where identities are).
    """
    for what, sizes in STEP_SIZES.items():
        for size in sizes:
            given = {"height": 144, "width": 72, "people": 4} | size
            people = 2 if what == "identities" else given["people"]
            del given["people"]
            x = {"views": 6 * people, "height": given["height"]}.get(what)
            x = x or given["n_identities"]
            method = paper_method("afen", **given)
            yield point("growth of a step", what, x, step_of(method, people))


GALLERIES = (10**3, 10**4, 10**5, 10**6)


def growth_of_evaluation() -> Iterator[dict[str, Any]]:
    """Evaluating 64 queries against larger and larger galleries."""
    for n in GALLERIES:
        case = trial(64, n, "regdb", 0)
        case |= {"gallery_ids": np.arange(n) % (n // 10), "query_ids": np.arange(64)}
        held = {"held_megabytes": case["distances"].nbytes / 1e6}
        yield point("growth of evaluation", "ours", n, partial(evaluate, **case)) | held


def growth_of_search() -> Iterator[dict[str, Any]]:
    """The nearest of 64 queries, exact, and by faiss where it is installed."""
    for n in GALLERIES:
        query, gallery = crowd(n, 64)
        run, held = partial(exact_search, query, gallery, IMAGES), gallery.nbytes / 1e6
        row = point("growth of search", "exact, in blocks", n, run)
        yield row | {"held_megabytes": held}
        if find_spec("faiss"):
            row = point("growth of search", "exact, faiss", n, flat_index(query, gallery))
            yield row | {"held_megabytes": 2 * held}  # it copies the gallery
    if not find_spec("faiss"):
        why = "not run: faiss is not installed (pip install -e '.[faiss]')"
        yield {"case": "recall of search", "variant": "faiss", "why": why}
        return
    yield from recall_of_search(*crowd(10**5, 256))


def flat_index(query: Tensor, gallery: Tensor) -> Run:
    """The exact search of faiss."""
    import faiss

    index = faiss.IndexFlatIP(WIDTH)
    index.add(gallery.numpy())
    return lambda: index.search(query.numpy(), IMAGES)


def recall_of_search(query: Tensor, gallery: Tensor) -> Iterator[dict[str, Any]]:
    """Recall of the true nearest against time: of a gallery's cells, some are visited."""
    import faiss

    case, n_cells = "recall of search", 1024
    exact = partial(exact_search, query, gallery, IMAGES)
    true = exact().numpy()
    yield point(case, "exact, in blocks", 1.0, exact)
    index = faiss.IndexIVFFlat(
        faiss.IndexFlatIP(WIDTH), WIDTH, n_cells, faiss.METRIC_INNER_PRODUCT
    )
    yield point(case, "faiss, building", 0.0, lambda: build(index, gallery), repeats=1)
    for visited in (1, 4, 16, 64, 256):
        index.nprobe = visited
        run = partial(index.search, query.numpy(), IMAGES)
        shared = [len({*a} & {*b}) / IMAGES for a, b in zip(true, run()[1])]
        recall = float(np.mean(shared))
        yield point(case, f"faiss, {visited} of {n_cells} cells", recall, run)


def build(index: Any, gallery: Tensor) -> None:
    """Train and fill an index of faiss."""
    index.train(gallery[: len(gallery) // 2].numpy())
    index.add(gallery.numpy())


# --- commands ----------------------------------------------------------------------------


def command(words: list[str]) -> Iterator[dict[str, Any]]:
    """A whole command: seconds by the clock, and processor seconds of all it started."""
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    begun, before = time.perf_counter(), used()
    done = subprocess.run(words, cwd=project_root(), capture_output=True)
    clock, load = time.perf_counter() - begun, os.getloadavg()[0]
    row = {"case": " ".join(words), "variant": "ours", "seconds": clock, "load": load}
    yield row | {"processor_seconds": used() - before, "returned": done.returncode}


# --- all of it ---------------------------------------------------------------------------

CASES = {
    "ten single-shot trials": ranking_case(3803, 301, "sysu", 10, 200),
    "ten multi-shot trials": ranking_case(3803, 3010, "sysu", 10, 2000),
    "RegDB, one direction": ranking_case(2060, 2060, "regdb", 1, 50),
    "96 views": Case(views, repeats=9),
    "training step": Case(steps, repeats=2),
    "embedding": Case(embeddings, repeats=5),
    "median": Case(medians, repeats=5),
    "optimiser": Case(optimisers, repeats=5),
    "pocket step": Case(pocket_step),
}
GROWTH = {
    "growth of a step": growth_of_step,
    "growth of evaluation": growth_of_evaluation,
    "growth of search": growth_of_search,
}
COMMANDS = {  # only when named
    "make demo": partial(command, ["make", "demo"]),
    "make test": partial(command, ["make", "test"]),
}


def timed(run: Run) -> float:
    """Processor seconds of a run."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


def measure(name: str) -> Iterator[dict[str, Any]]:
    """A case's rows: the median seconds of each variant for the whole work."""
    case, times = CASES[name], {}
    variants = case.make()
    for turn in range(case.repeats + 1):
        for variant, run in variants.items():
            seconds = case.parts.get(variant, 1) * timed(run)
            times.setdefault(variant, []).append(seconds)
    load = os.getloadavg()[0]
    for variant, each in times.items():
        each = each[1:]  # the first turn warms up
        row = {"case": name, "variant": variant, "seconds": statistics.median(each)}
        part = case.parts.get(variant, 1)
        yield row | {"each": each, "part": part, "load": load}


def faiss_version() -> str:
    """Its version, or that it is not there."""
    return metadata.version("faiss-cpu") if find_spec("faiss") else "not installed"


def describe() -> dict[str, Any]:
    """The machine, the code and the command."""
    return {
        "schema": 2,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "tests/bench.py", *sys.argv[1:]]),
        "machine": {
            "processor": cpu_name(),
            "cores": psutil.cpu_count(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "memory_gigabytes": round(psutil.virtual_memory().total / 1e9, 1),
            "system": platform.platform(terse=True),
            "load": list(os.getloadavg()),
        },
        "code": code_revision(),
        "packages": package_versions() | {"faiss": faiss_version()},
    }


def main(names: list[str]) -> None:
    """Measure the named cases, or all, one after the other; the record grows with each."""
    torch.set_num_threads(1)
    cases = {name: partial(measure, name) for name in CASES} | GROWTH
    known = cases | COMMANDS
    for name in names:
        if name not in known:
            raise SystemExit(f"Unknown case {name!r} (known: {', '.join(known)}).")
    record, begun = describe() | {"rows": []}, time.perf_counter()
    moment = record["started"][:19].replace(":", "")
    target = project_root() / "runs" / "bench" / f"{moment}.json"
    for name in names or cases:
        for row in known[name]():
            print(row.get("why") or "{case}, {variant}: {seconds:.3g} s".format(**row), flush=True)
            record["rows"].append(row)
        record["seconds"] = round(time.perf_counter() - begun, 1)
        record["processor_seconds"] = round(time.process_time(), 1)
        with atomic_path(target) as path:
            path.write_text(json.dumps(record, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main(sys.argv[1:])
