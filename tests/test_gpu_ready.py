"""What a GPU will run, run without one: nothing waits, and every check of `tests/gpu.py`."""

import contextlib
import json
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import gpu
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from afen.batches import Batch
from afen.method import create, method_class, method_names
from afen.people import write_tree
from afen.records import read_record
from afen.runs import DEFAULTS, carry_out, make_plan, open_data, start
from afen import training
from afen.training import (
    backward,
    backward_in_chunks,
    check_chunk,
    compile_method,
    compiled_parts,
    make_optimiser,
    make_scaler,
    memory_of_step,
    saved_bytes,
    train_step,
)

CPU, META = torch.device("cpu"), torch.device("meta")
QUICK = {"preset": "pocket", "epochs": 2, "steps": 1, "identities": 2, "images": 2}


def small_recipe(name, **changes):
    """A method's pocket recipe with four identities in a batch."""
    pocket = method_class(name).recipes["pocket"]
    size = {"height": 32, "width": 16, "identities": 4, "images": 2, "weights": "none"}
    return replace(pocket, **size | changes)


def made_up_batch(recipe, draws=1, device=CPU, seed=0):
    """A batch of noise with as many identities and images as the recipe says."""
    generator = torch.Generator().manual_seed(seed)
    n = recipe.identities * recipe.images * draws
    size = n, 3, recipe.height, recipe.width
    labels = torch.arange(recipe.identities).repeat_interleave(recipe.images)
    images = [torch.randint(0, 256, size, generator=generator).byte() for _ in "vi"]
    scale = torch.tensor([recipe.width, recipe.height, 1.0])
    joints = [torch.rand(n, 17, 3, generator=generator) * scale for _ in "vi"]
    columns = *images, *[labels.repeat(draws)] * 2
    rows = np.arange(n), np.arange(n)
    columns = [column.to(device) for column in columns]
    return Batch(*columns, *rows, *(j.to(device) for j in joints), generator)


# --- nothing waits ---------------------------------------------------------------------


class BlockingCopies(TorchDispatchMode):
    """Notes each copy between two devices that the host would wait for."""

    def __init__(self):
        super().__init__()
        self.copies = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        aten = torch.ops.aten
        if func in (aten._to_copy.default, aten.copy_.default):
            tensors = [t for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if waits and len({t.device.type for t in tensors}) > 1:
                self.copies.append(str(func))
        return out


@pytest.fixture
def meta_autocast(monkeypatch):
    """Let autocast be asked for the meta device, which has none."""
    real = torch.autocast

    def autocast(kind, *args, **keywords):
        return contextlib.nullcontext() if kind == "meta" else real(kind, *args, **keywords)

    monkeypatch.setattr(torch, "autocast", autocast)


def step_on_meta(name, epoch, chunk=None):
    """A step on tensors without values, where whoever asks for a value is refused.

    `item`, `bool`, `tolist`, `nonzero`, `unique` and masks as indices raise there; copies
    that would block are returned.
    """
    recipe = small_recipe(name)
    method = create(name, recipe.identities, recipe).to(META).train()
    batch = made_up_batch(recipe, method.draws, META)
    if name == "dart":
        method.confidence = torch.zeros(2, 3, len(batch.visible), device=META)
    scaler = make_scaler(CPU, "float32")
    optimiser = make_optimiser(method)
    with BlockingCopies() as noted:
        losses = train_step(method, optimiser, batch, epoch, "float32", scaler, chunk)
    assert {loss.device.type for loss in losses.values()} == {"meta"}
    return noted.copies


LATE = 8  # an epoch after every warm-up and first phase


@pytest.mark.parametrize("epoch", [0, LATE])
@pytest.mark.parametrize("name", method_names())
def test_a_step_asks_a_device_for_no_value(meta_autocast, name, epoch):
    assert step_on_meta(name, epoch) == []


@pytest.mark.parametrize("name", ["afen", "agw", "caj"])
def test_a_step_in_chunks_asks_a_device_for_no_value(meta_autocast, name):
    assert step_on_meta(name, 0, chunk=5) == []


def test_what_waits_would_be_noticed(meta_autocast):
    value = torch.ones(3, device=META)
    for ask in (torch.Tensor.item, bool, torch.Tensor.tolist, torch.Tensor.nonzero):
        with pytest.raises((NotImplementedError, RuntimeError)):
            ask(value[0] if ask in (torch.Tensor.item, bool) else value)
    with BlockingCopies() as noted:
        torch.ones(3).to(META, non_blocking=True)
        assert noted.copies == []
        torch.ones(3).to(META)
    assert len(noted.copies) == 1


# --- chunks, scaler, compilation, memory -----------------------------------------------


def gradients(name, chunk, frozen=True):
    """Losses and all gradients [n] of one batch in float64."""
    torch.manual_seed(0)
    recipe = small_recipe(name)
    method = create(name, recipe.identities, recipe).double().train()
    method.net.train(not frozen)
    views = method.views

    def wide(batch):
        return [v.double() if v.is_floating_point() else v for v in views(batch)]

    method.views, batch = wide, made_up_batch(recipe)
    scaler = make_scaler(CPU, "float32")
    if chunk:
        losses = backward_in_chunks(method, batch, "float32", scaler, chunk)
    else:
        losses = backward(method, batch, 0, "float32", scaler)
    every = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
    return losses, torch.cat(every), method


@pytest.mark.parametrize("chunk", [3, 7, 100])
@pytest.mark.parametrize("name", ["afen", "agw", "caj"])
def test_chunks_give_the_whole_batchs_losses_and_gradients(name, chunk):
    whole, gradient, _ = gradients(name, None)
    parts, same, _ = gradients(name, chunk)
    for term, loss in whole.items():
        assert abs(loss - parts[term]) < 1e-6
    assert (gradient - same).norm() < 1e-6 * gradient.norm()


def test_chunks_differ_where_batch_norm_sees_a_chunk_alone():
    whole, gradient, _ = gradients("agw", None, frozen=False)
    parts, other, method = gradients("agw", 6, frozen=False)
    assert (gradient - other).norm() > 1e-6 * gradient.norm()
    norm = method.net.stems["visible"][1]
    assert norm.num_batches_tracked == 3  # once per chunk: the first pass left no trace


@pytest.mark.parametrize("name", method_names())
def test_methods_without_pooled_losses_refuse_chunks(name):
    kind = method_class(name)
    if name in ("afen", "agw", "caj"):
        check_chunk(kind, 8)
    else:
        with pytest.raises(ValueError, match=f"{name} cannot be trained in chunks"):
            check_chunk(kind, 8)


def test_a_step_in_float16_is_scaled_and_an_overflow_left_out():
    recipe = small_recipe("agw", height=16, width=8, identities=2)
    method = create("agw", recipe.identities, recipe).train()
    optimiser, scaler = make_optimiser(method), make_scaler(CPU, "float16")
    weight = method.head.classifier.weight
    for scale, moves in ((2.0**8, True), (1e38, False)):  # the second overflows
        scaler.load_state_dict(scaler.state_dict() | {"scale": scale})  # as a checkpoint
        before = weight.detach().clone()
        losses = train_step(method, optimiser, made_up_batch(recipe), 0, "float16", scaler)
        assert torch.isfinite(losses["loss"])
        assert torch.equal(before, weight) != moves
        assert (scaler.get_scale() == scale) == moves


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_parts_to_compile(name):
    """Stems and stages are among them, or the transformer; no part holds another."""
    method = create(name, 4, small_recipe(name))
    parts = [*compiled_parts(method)]
    inside = {id(m) for part in parts for m in part.modules() if m is not part}
    assert parts and not inside & {id(part) for part in parts}
    held = sum(p.numel() for part in parts for p in part.parameters())
    assert held > 0.8 * sum(p.numel() for p in method.parameters())


def test_a_compiled_step_is_the_same_step():
    """With torch's backend "eager", which needs no compiler."""
    recipe, losses = small_recipe("agw"), []
    for compiled in (False, True):
        torch.manual_seed(0)
        method = create("agw", recipe.identities, recipe).train()
        if compiled:
            compile_method(method, backend="eager")
        step = train_step(method, make_optimiser(method), made_up_batch(recipe), 0, "float32")
        losses.append(step)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("name", method_names())
def test_memory_grows_as_a_line(name):
    """Activations of a batch follow from those of two smaller ones, within 10 per cent."""
    recipe = small_recipe(name)
    method = create(name, recipe.identities, recipe).train()
    batches = [
        made_up_batch(replace(recipe, images=images), method.draws) for images in (2, 4, 6)
    ]
    images = 2 * len(batches[2].visible)
    guess = memory_of_step(method, batches[:2], images)["activations"]
    assert abs(guess / saved_bytes(method, batches[2]) - 1) < 0.1


def test_counting_memory_frees_what_it_counted():
    recipe, outputs = small_recipe("agw"), []
    method = create("agw", recipe.identities, recipe).train()
    watch = lambda module, _, output: outputs.append(weakref.ref(output))
    for module in method.modules():
        if isinstance(module, torch.nn.ReLU):  # whose output the graph saves
            module.register_forward_hook(watch)
    saved_bytes(method, made_up_batch(recipe))
    assert outputs and not any(reference() is not None for reference in outputs)


# --- runs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A small rendered tree."""
    folder = tmp_path_factory.mktemp("tree") / "regdb"
    return write_tree("regdb", folder, n_train=4, n_test=4, n_images=2, size=(48, 24))


def plan_of(tree, folder, **changes):
    """A quick run on the CPU."""
    given = {"dataset": "regdb", "root": str(tree), "out": str(folder), "device": "cpu"}
    return make_plan(DEFAULTS | QUICK | given | {"method": "agw"} | changes)


def test_a_watched_run_trains_the_same_and_says_so(tree, tmp_path, capsys):
    """The headline stays the last epoch's score; the watched ones are in the history."""
    plans = [plan_of(tree, tmp_path / str(n), watch=n, epochs=3) for n in (None, 2)]
    assert plans[0].parameters == plans[1].parameters
    for plan in plans:
        carry_out(plan)
    assert "chosen on test data" in capsys.readouterr().out
    plain, watched = (read_record(plan.folder / "record.json") for plan in plans)
    assert plain["scores"] == watched["scores"]
    rows = [row.keys() & {"watched_rank1", "watched_mAP"} for row in watched["history"]]
    assert list(map(len, rows)) == [0, 2, 0]
    for before, after in zip(plain["history"], watched["history"]):
        assert all(before[k] == after[k] for k in before if k != "seconds")
    metrics = pd.read_csv(plans[1].folder / "metrics.csv")
    assert metrics.watched_rank1.notna().tolist() == [False, True, False]


def test_a_run_in_chunks_has_another_name_and_says_so(tree, tmp_path):
    plain, chunks = (plan_of(tree, tmp_path / "run", chunk=n) for n in (None, 3))
    assert "chunk" not in plain.parameters and chunks.parameters["chunk"] == 3
    assert chunks.changed[-1] == "chunk"
    carry_out(chunks)
    record = read_record(chunks.folder / "record.json")
    assert record["machine"]["precision"] == "float32, 3 views per pass"


def test_a_compiled_run_keeps_its_name_and_says_so(tree, tmp_path, monkeypatch):
    real = training.compile_method
    monkeypatch.setattr(training, "compile_method", lambda method: real(method, "eager"))
    plan = plan_of(tree, tmp_path / "run", compile=True)
    assert plan.parameters == plan_of(tree, tmp_path / "run").parameters
    carry_out(plan)
    record = read_record(plan.folder / "record.json")
    assert record["machine"]["precision"] == "float32, compiled"


def test_a_step_that_does_not_fit_says_what_it_needs(tree, tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "seconds_per_step", full)
    plan = plan_of(tree, tmp_path / "run")
    said = "does not fit on cpu, memory of a step in MB: total .*-p chunk"
    with pytest.raises(MemoryError, match=said):
        start(plan, open_data(plan))


# --- the script for a GPU, on the CPU ----------------------------------------------------

ALL = list(gpu.all_checks(CPU, Path("unused"), tiny=True))


@pytest.mark.parametrize("name", ALL)
def test_every_check_for_a_gpu_runs_on_the_cpu(tmp_path, name):
    found = gpu.all_checks(CPU, tmp_path, tiny=True)[name]()
    assert found["ok"] is True, found
    json.dumps(found)  # it goes into a record


@pytest.mark.parametrize("factor", [2.0, float("nan")])
def test_a_wrong_gradient_is_noticed(monkeypatch, factor):
    """The comparison of a method with itself is not empty."""
    real, calls = gpu.outcome, []

    def wrong(*args):
        losses, gradients, features = real(*args)
        calls.append(args)
        return [losses, gradients * (factor if len(calls) % 2 else 1.0), features]

    monkeypatch.setattr(gpu, "outcome", wrong)
    found = gpu.check_method(CPU, "agw", tiny=True)
    assert not found["ok"] and not found["gradients"] < 0.3 and found["losses"] == 0


def test_waits_are_asked_for_on_cuda_alone(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with gpu.noting_waits(torch.device("cuda")) as told:
        warnings.warn("called a synchronizing CUDA operation")
        warnings.warn("something else")
    assert len(told) == 1 and modes == ["warn", "default"]
    with gpu.noting_waits(CPU):
        assert modes == ["warn", "default"]


def test_the_record_of_all_checks(tmp_path, monkeypatch, capsys):
    """Errors and the clock are outcomes too, and the record is whole after each."""

    def endless():
        while True:
            pass

    checks = {
        "right": lambda: {"ok": True, "value": 1.0},
        "broken": lambda: 1 / 0,
        "endless": endless,
        "late": lambda: {"ok": True},
    }
    monkeypatch.setattr(gpu, "all_checks", lambda *_: checks)
    gpu.run_checks(CPU, tmp_path / "runs" / "gpu.json", limit=1.0)
    record = json.loads((tmp_path / "runs" / "gpu.json").read_text())
    oks = {name: found["ok"] for name, found in record["checks"].items()}
    assert oks == {"right": True, "broken": False, "endless": None, "late": None}
    assert "ZeroDivisionError" in record["checks"]["broken"]["why"]
    assert record["versions"]["torch"] and record["code"]["revision"]
    assert capsys.readouterr().out.startswith("ok    right")


def test_without_a_gpu_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 1
    said = capsys.readouterr().out
    assert said.startswith("This needs one NVIDIA GPU") and said.count("\n") == 1


def test_with_a_gpu_the_exit_status_says_whether_all_was_right(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "project_root", lambda: tmp_path)
    for ok, status in ((True, 0), (False, 1), (None, 0)):
        checks = {"one": {"ok": ok}}
        monkeypatch.setattr(gpu, "run_checks", lambda *_: {"checks": checks})
        assert gpu.main() == status
