"""What only a GPU can show, in eight minutes at most: python -m tests.gpu, make check-gpu.

Each check is a function of a device, and `tests/test_gpu_ready.py` runs all of them on the
CPU at tiny size. One JSON record of the outcomes is left in `runs/`. Correctness comes
first, so that what time cuts off are measurements of speed; what was cut off is said.
"""

import contextlib
import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from afen.batches import Batch
from afen.core import project_root, time_step
from afen.evaluation import (
    cosine_distances,
    evaluate,
    evaluate_naive,
    rerank,
    rerank_naive,
)
from afen.method import Method, create, method_class, method_names
from afen.people import write_tree
from afen.records import code_revision, package_versions, read_record
from afen.runs import DEFAULTS, carry_out, make_plan, open_data, start
from afen.training import (
    AT_ONCE,
    PRECISIONS,
    backward,
    compile_method,
    make_optimiser,
    make_scaler,
    precision_words,
    prepare_device,
    train_step,
)

LIMIT = 480  # seconds for everything
IDENTITIES = 206  # of a RegDB split
LATE = 0.9  # of the epochs: after every warm-up and first phase
TOLERANCE = 1e-2  # of gradients in float32, relative: sums in another order


# --- what a check is given ---------------------------------------------------------------


def recipe_for(name: str, tiny: bool) -> Any:
    """The paper's recipe without weights, or a tiny one."""
    recipes = method_class(name).recipes
    if tiny:
        return replace(recipes["pocket"], height=32, width=16, identities=2, images=2)
    return replace(recipes["paper"], weights="none")


def made_up_batch(recipe: Any, draws: int, device: torch.device, seed: int = 0) -> Batch:
    """A batch of noise on a device, with identities and images as the recipe says."""
    generator = torch.Generator().manual_seed(seed)
    n, each = recipe.identities * recipe.images * draws, recipe.images
    size = n, 3, recipe.height, recipe.width
    labels = torch.arange(recipe.identities).repeat_interleave(each).repeat(draws)
    images = [torch.randint(0, 256, size, generator=generator).byte() for _ in "vi"]
    images = [i.contiguous(memory_format=torch.channels_last).to(device) for i in images]
    corner = torch.tensor([recipe.width, recipe.height, 1.0])
    joints = [(torch.rand(n, 17, 3, generator=generator) * corner).to(device) for _ in "vi"]
    labels, rows = labels.to(device), np.arange(n)
    return Batch(*images, labels, labels, rows, rows, *joints, generator)


def made(name: str, tiny: bool, device: torch.device) -> tuple[Method, Batch]:
    """A seeded method in training mode, and a batch for it."""
    recipe = recipe_for(name, tiny)
    torch.manual_seed(0)
    method = create(name, max(IDENTITIES, recipe.identities), recipe).train()
    method = method.to(device, memory_format=torch.channels_last)
    batch = made_up_batch(recipe, method.draws, device)
    if name == "dart":  # labels of which both networks are sure
        method.confidence = torch.ones(2, 3, len(batch.visible), device=device)
    return method, batch


# --- right or wrong ------------------------------------------------------------------------


@contextlib.contextmanager
def plain_float32() -> Iterator[None]:
    """Without TF32: products of 24-bit factors, as on the CPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def without_chance(method: Method) -> Method:
    """Dropout off: its random numbers are another device's."""
    for module in method.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):  # timm's stochastic depth
            module.drop_prob = 0.0
    return method


def outcome(method: Method, recipe: Any, epoch: int, device: torch.device) -> list[Tensor]:
    """Losses [n], gradients [n] and embeddings [B, C] of a copy of the method, on the CPU."""
    method = deepcopy(method).to(device, memory_format=torch.channels_last)
    batch = made_up_batch(recipe, method.draws, device)
    losses = backward(method, batch, epoch, "float32", make_scaler(device, "float32"))
    gradients = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
    method.eval()
    with torch.no_grad():
        halves = (batch.visible, "visible"), (batch.infrared, "infrared")
        features = [method.embed(*half).flatten() for half in halves]
    parts = [torch.stack([*losses.values()]), torch.cat(gradients), torch.cat(features)]
    return [part.cpu() for part in parts]


def check_method(device: torch.device, name: str, tiny: bool) -> dict[str, Any]:
    """Losses, gradients and embeddings on the device against the CPU, both phases.

    At the paper's size two identities, as the CPU is slow.
    """
    cpu, method = torch.device("cpu"), without_chance(made(name, tiny, torch.device("cpu"))[0])
    recipe = replace(recipe_for(name, tiny), identities=2, images=2)
    gaps: list[list[float]] = []
    for epoch in (0, math.floor(LATE * recipe.epochs)):
        with plain_float32():
            there, here = (outcome(method, recipe, epoch, d) for d in (device, cpu))
        gaps.append([float((a - b).norm() / b.norm()) for a, b in zip(there, here)])
    largest = np.max(gaps, axis=0)  # no number stays none
    names = ("losses", "gradients", "embeddings")
    return {"ok": bool((largest < TOLERANCE).all()), **dict(zip(names, largest.tolist()))}


@contextlib.contextmanager
def noting_waits(device: torch.device) -> Iterator[list[str]]:
    """Where the host waited for the device, in torch's words; CUDA alone tells."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield told
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            said = [w for w in caught if "synchroniz" in str(w.message)]
            told += [f"{Path(w.filename).name}:{w.lineno}" for w in said]


def check_waits(device: torch.device, name: str, tiny: bool) -> dict[str, Any]:
    """How often the host waits within a training step, and where."""
    method, batch = made(name, tiny, device)
    optimiser, told = make_optimiser(method), {}
    for epoch in (0, math.floor(LATE * method.recipe.epochs)):
        train_step(method, optimiser, batch, epoch, "float32")  # what happens once
        with noting_waits(device) as places:
            train_step(method, optimiser, batch, epoch, "float32")
        told[f"epoch {epoch}"] = places
    free = name in ("afen", "agw", "caj") and any(told.values())
    return {"ok": not free, **told}


def check_precisions(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Steps of AFEN in every precision, whole and in chunks: losses stay numbers."""
    said: dict[str, Any] = {}
    for precision in PRECISIONS:
        for chunk in (None, 4):
            method, batch = made("afen", True, device)
            optimiser, scaler = make_optimiser(method), make_scaler(device, precision)
            step = partial(train_step, method, optimiser, batch, 0, precision, scaler, chunk)
            losses = [float(step()["loss"]) for _ in range(1 if tiny else 5)]
            said[f"{precision}, chunk {chunk}"] = losses
    return {"ok": bool(np.isfinite([*said.values()]).all()), **said}


def check_evaluation(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Scores and re-ranking of features that lie on the device, against the oracle."""
    n, generator = (30 if tiny else 200), torch.Generator().manual_seed(0)
    noise = torch.randn(2, n, 32, generator=generator).to(device)
    q, g = nn.functional.normalize(noise + noise[:1], dim=2)  # [n, 32] each
    ids, cams, gap = np.arange(n) // 3, np.arange(n) % 2 + 2, 0.0
    arrays = [side.cpu().double().numpy() for side in (q, g)]
    for protocol in ("regdb", "sysu", "llcm"):
        rules = ids, ids, cams, cams, protocol
        for there, here in (
            (cosine_distances(q.double(), g.double()), cosine_distances(*arrays)),
            (rerank(q.double(), g.double()), rerank_naive(*arrays)),
        ):
            fast, slow = evaluate(there, *rules), evaluate_naive(here, *rules)
            pairs = (fast.mAP, slow.mAP), (fast.mINP, slow.mINP), (fast.rank(1), slow.rank(1))
            gap = float(np.max([gap, *(abs(a - b) for a, b in pairs)]))
    return {"ok": gap < 1e-9, "largest difference": gap}


# --- runs ------------------------------------------------------------------------------------


class Stop(Exception):
    """Pulls the plug."""


def trained(plan: Any, data: Any, stop: int | None = None) -> Tensor:
    """The weights [n] after a run, or the plug pulled at the beginning of epoch `stop`."""
    run = start(plan, data)
    begin = run.method.begin_epoch

    def begin_epoch(epoch: int, sweep: Any) -> None:
        if epoch == stop:
            raise Stop
        begin(epoch, sweep)

    run.method.begin_epoch = begin_epoch
    with contextlib.suppress(Stop):
        run.fit(progress=False)
    return torch.cat([p.detach().flatten() for p in run.method.parameters()]).cpu()


def check_resume(device: torch.device, folder: Path, precision: str) -> dict[str, Any]:
    """A run, the same again, and one that is killed and resumed: how far are they apart?

    Where two whole runs differ, a resumed one may, by as much.
    """
    root = folder / f"tree-{precision}"
    write_tree("regdb", root, n_train=4, n_test=4, n_images=2, size=(48, 24))
    given = DEFAULTS | {"dataset": "regdb", "root": str(root), "preset": "pocket"}
    given |= {"method": "afen", "identities": 2, "images": 2, "epochs": 4, "steps": 2}
    given |= {"device": str(device), "precision": precision}
    plans = {
        name: make_plan(given | {"out": str(folder / f"{name}-{precision}")})
        for name in ("one", "two", "killed")
    }
    for plan in plans.values():
        plan.folder.mkdir()
    data = open_data(plans["one"])
    one, two = (trained(plans[name], data) for name in ("one", "two"))
    trained(plans["killed"], data, stop=2)
    resumed = trained(plans["killed"], data)
    again, gap = (float((one - other).norm() / one.norm()) for other in (two, resumed))
    equal = torch.equal(one, resumed)
    words = "bit-equal" if equal else f"{gap:.1e} apart, two whole runs {again:.1e}"
    return {"ok": equal or gap <= 10 * again, "resumed": words}


def check_run(device: torch.device, folder: Path, tiny: bool) -> dict[str, Any]:
    """AFEN's pocket run from images to a record, watched; tiny: on a written tree."""
    given = DEFAULTS | {"device": str(device), "out": str(folder / "run"), "watch": 5}
    if tiny:
        root = folder / "tree"
        write_tree("regdb", root, n_train=4, n_test=4, n_images=2, size=(48, 24))
        given |= {"dataset": "regdb", "root": str(root), "preset": "pocket", "watch": 1}
        given |= {"identities": 2, "images": 2, "epochs": 2, "steps": 1}
    carry_out(make_plan(given))
    record = read_record(folder / "run" / "record.json")
    first, last = record["history"][0]["loss"], record["history"][-1]["loss"]
    said = {"scores": {s: entry["mean"] for s, entry in record["scores"].items()}}
    said |= {"loss": [first, last], "machine": record["machine"]}
    return {"ok": record["status"] == "smoke" and (tiny or last < first), **said}


# --- speed ---------------------------------------------------------------------------------


def check_step(
    device: torch.device, name: str, precision: str, backend: str | None, tiny: bool
) -> dict[str, Any]:
    """Seconds, images per second and peak memory of a training step, compiled or not."""
    prepare_device(device)
    method, batch = made(name, tiny, device)
    if backend:
        compile_method(method, backend)
    optimiser, scaler = make_optimiser(method), make_scaler(device, precision)
    begun = time.perf_counter()
    step = partial(train_step, method, optimiser, batch, 0, precision, scaler)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    repeats = 1 if tiny else 5
    seconds = time_step(step, device, repeats)
    images = len(batch.visible) + len(batch.infrared)
    first = time.perf_counter() - begun - repeats * seconds
    return {
        "ok": math.isfinite(float(step()["loss"])),
        "precision": precision_words(device, precision),
        "seconds": seconds,
        "images per second": images / seconds,
        "peak GB": peak_memory(device),
        "seconds before": first,  # compilation, and cuDNN's choice of algorithms
    }


def peak_memory(device: torch.device) -> float | None:
    """The most that torch held on the device, in GB; only a GPU tells."""
    on_gpu = device.type == "cuda"
    return torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None


def check_augmentation(device: torch.device, tiny: bool) -> dict[str, Any]:
    """CAJ's views of a batch: seconds, views per second, operations of torch."""
    method, batch = made("caj", tiny, device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        views = method.views(batch)
    seconds = time_step(lambda: method.views(batch), device, repeats=5)
    count = sum(event.count for event in profile.key_averages())
    each = len(views[2]) / seconds
    finite = all(bool(view.isfinite().all()) for view in views[:2])
    return {"ok": finite, "seconds": seconds, "views per second": each, "operations": count}


@torch.no_grad()
def check_embedding(device: torch.device, precision: str, tiny: bool) -> dict[str, Any]:
    """Images per second of AFEN's embedding, and of torchvision's plain ResNet-50."""
    method, recipe = made("afen", tiny, device)[0].eval(), recipe_for("afen", tiny)
    plain = torchvision.models.resnet50(weights=None).eval()
    plain = plain.to(device, memory_format=torch.channels_last)
    n = 4 if tiny else AT_ONCE
    images = torch.zeros(n, 3, recipe.height, recipe.width, dtype=torch.uint8)
    images = images.contiguous(memory_format=torch.channels_last).to(device)
    dtype, said = PRECISIONS[precision], {}
    for name, run in {
        "afen": lambda: method.embed(images, "visible"),
        "resnet50": lambda: plain(images.float()),
    }.items():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            said[f"{name}, images per second"] = n / time_step(run, device, repeats=5)
    return {"ok": True, **said}


# --- all of it -------------------------------------------------------------------------------


def all_checks(
    device: torch.device, folder: Path, tiny: bool = False
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every check by its name, in the order of their worth."""
    backend = "eager" if tiny else "inductor"
    bound: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in method_names():
        bound[f"method {name}"] = partial(check_method, device, name, tiny)
    bound["evaluation"] = partial(check_evaluation, device, tiny)
    bound["precisions"] = partial(check_precisions, device, tiny)
    for precision in ("float32", "float16") if device.type == "cuda" else ("float32",):
        bound[f"resume {precision}"] = partial(check_resume, device, folder, precision)
    for name in method_names():
        bound[f"waits {name}"] = partial(check_waits, device, name, tiny)
    bound["run"] = partial(check_run, device, folder, tiny)
    bound["augmentation"] = partial(check_augmentation, device, tiny)
    for precision in ("float32", "bfloat16"):
        bound[f"embedding {precision}"] = partial(check_embedding, device, precision, tiny)
        for name in method_names():
            step = partial(check_step, device, name, precision, None, tiny)
            bound[f"step {name} {precision}"] = step
    precision = "float32" if tiny else "bfloat16"  # some processors are slow in the latter
    for name in method_names():  # last: minutes of compilation
        step = partial(check_step, device, name, precision, backend, tiny)
        bound[f"step {name} {precision} compiled"] = step
    return bound


class TimeUp(Exception):
    """The eight minutes are over."""


def time_up(*_: Any) -> None:
    """What the clock's signal does."""
    raise TimeUp


def outcome_of(check: Callable[[], dict[str, Any]], left: float) -> dict[str, Any]:
    """A check's outcome and seconds; an error is one, and so is the clock."""
    begun = time.perf_counter()
    if left <= 0:
        return {"ok": None, "why": "not run: the time was over"}
    signal.signal(signal.SIGALRM, time_up)
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        found = check()
    except TimeUp:
        found = {"ok": None, "why": "not finished: the time was over"}
    except Exception as error:
        found = {"ok": False, "why": f"{type(error).__name__}: {error}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return found | {"took": round(time.perf_counter() - begun, 2)}


def describe(device: torch.device) -> dict[str, Any]:
    """The device, its driver, and the versions of what ran."""
    about: dict[str, Any] = {"device": str(device), "versions": package_versions()}
    about |= {"code": code_revision(), "cuda": torch.version.cuda}
    about["started"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name(device)
        about["memory GB"] = torch.cuda.get_device_properties(device).total_memory / 1e9
        about["cudnn"] = torch.backends.cudnn.version()
    if shutil.which("nvidia-smi"):
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        about["driver"] = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    return about


def run_checks(
    device: torch.device, target: Path, tiny: bool = False, limit: float = LIMIT
) -> dict[str, Any]:
    """Run every check within the limit; the record is written after each."""
    record, begun = describe(device) | {"limit": limit, "checks": {}}, time.perf_counter()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, check in all_checks(device, Path(folder), tiny).items():
            found = outcome_of(check, limit - (time.perf_counter() - begun))
            record["checks"][name] = found
            record["seconds"] = round(time.perf_counter() - begun, 1)
            target.write_text(json.dumps(record, indent=1) + "\n")
            mark = {True: "ok", False: "WRONG", None: "--"}[found["ok"]]
            rest = {k: v for k, v in found.items() if k != "ok"}
            print(f"{mark:5} {name}: {json.dumps(rest)[:300]}", flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return record


def main() -> int:
    """Check the first GPU. Returns 1 without one, or when a check went wrong."""
    if not torch.cuda.is_available():
        print(
            "This needs one NVIDIA GPU that torch can use (a driver for CUDA "
            f"{torch.version.cuda or 'and a torch built with it'}, about 16 GB of its memory) "
            "and eight minutes; torch finds none here, so nothing was checked."
        )
        return 1
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    target = project_root() / "runs" / f"gpu-{stamp}.json"
    record = run_checks(torch.device("cuda", 0), target)
    outcomes = [found["ok"] for found in record["checks"].values()]
    print(f"{outcomes.count(True)} of {len(outcomes)} checks right, "
          f"{outcomes.count(False)} wrong, {outcomes.count(None)} cut off: {target}")  # fmt: skip
    return int(False in outcomes)


if __name__ == "__main__":
    sys.exit(main())
