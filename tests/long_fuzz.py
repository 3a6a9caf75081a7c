"""Bytes that no reader expects, and properties under hypothesis, for as long as is given."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torchvision
from scipy.io import savemat

from afen import runs
from afen.backbone import load_resnet
from afen.batches import is_intact, pack
from afen.core import keyed_rng
from afen.datasets import list_tree, load, read_ids, read_index, read_joints, read_permutations
from afen.people import is_rendered, write_tree
from afen.probes import load_probes
from afen.records import read_record, records_folder
from afen.runs import sealed_weights
from afen.trained import read_weights
from afen.training import load_checkpoint, save_checkpoint

from .long_broken import is_sentence

ROOT = Path(__file__).resolve().parent.parent
TOKENS = [b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"NaN", b"Infinity", b"1e999", b"-1", b"{",
          b"[" * 50, b"null", b"9" * 30, "²".encode(), b'"', b",", b"\r\n", b" ", b"../", b"%s"]  # fmt: skip


# every so many rounds: a file of 45 MB, and processes that are started for each
SELDOM = {"start weights": 20, "ids as mat": 5, "draws": 5}


def damage(content, rng):
    """A few random changes of some bytes: flipped, gone, doubled, cut, put in."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(len(content) + 1))
        length = int(rng.integers(1, 20))
        kind = rng.integers(6)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del content[place : place + length]
        elif kind == 2:
            content[place:place] = content[place : place + length]
        elif kind == 3:
            del content[place:]
        elif kind == 4:
            content[place:place] = TOKENS[rng.integers(len(TOKENS))]
        else:
            content[place : place + length] = rng.bytes(length)
    return bytes(content)


def same(value, other):
    """Whether two read values are equal, arrays and tensors in them too."""
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(same(value[k], other[k]) for k in value)
    if isinstance(value, torch.Tensor):
        return torch.equal(value, other)
    return value == other


def readers(folder):
    """name -> (file, its reader, whether what is read must be as before or refused)."""
    small = {"n_train": 5, "n_test": 4, "n_images": 1, "size": (24, 12)}
    regdb, sysu = (write_tree(name, folder / name, **small) for name in ("regdb", "sysu"))
    record = folder / "record.json"
    shutil.copy(sorted(records_folder().glob("*.json"))[0], record)
    probe = folder / "probes" / "probe.json"
    probe.parent.mkdir()
    shutil.copy(sorted((records_folder() / "probes").glob("*.json"))[0], probe)
    checkpoint, weights = folder / "checkpoint.pt", folder / "weights.safetensors"
    save_checkpoint(checkpoint, key="a", epoch=1, method={"w": torch.arange(40.0)})
    weights.write_bytes(sealed_weights({"w": torch.arange(40.0)}, {"run": "a"}))
    start = folder / "start.pt"
    torch.save({"state_dict": torchvision.models.resnet18(weights=None).state_dict()}, start)
    paths = load("regdb", regdb).train.path
    packed = pack(regdb, paths, (24, 12), folder / "packed").path
    index, joints = "idx/train_visible_1.txt", regdb / "joints.csv"
    (sysu / "exp/val_id.txt").write_text("1,2,3")
    savemat(sysu / "exp/one_id.mat", {"id": np.arange(1, 9)})
    intact = lambda: is_intact(packed) or ValueError("A packed file that is damaged.")
    return {
        "index": (regdb / index, lambda: read_index(list_tree(regdb), index), False),
        "lists of a set": (regdb / index, lambda: load("regdb", regdb), False),
        "ids as text": (sysu / "exp/val_id.txt", lambda: read_ids(sysu, "exp/val_id"), False),
        "ids as mat": (sysu / "exp/one_id.mat", lambda: read_ids(sysu, "exp/one_id"), False),
        "draws": (sysu / "exp/rand_perm_cam.mat", lambda: read_permutations(sysu), False),
        "joints": (joints, lambda: read_joints(regdb), False),
        "mark": (regdb / "rendered.json", lambda: is_rendered(regdb) or None, True),
        "record": (record, lambda: read_record(record), True),
        "probe": (probe, lambda: load_probes(probe.parent)[0], True),
        "checkpoint": (checkpoint, lambda: load_checkpoint(checkpoint, "a"), True),
        "weights": (weights, lambda: read_weights(weights, "a"), True),
        "start weights": (start, lambda: load_resnet(18, str(start)) and None, False),
        "packed images": (packed, intact, True),
        "image": (regdb / paths[0], lambda: pack(regdb, paths, (24, 12), folder / "p"), False),
    }  # fmt: skip


def read(reader):
    """What a reader gives, or its error as one."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return reader()
    except Exception as error:
        return error


def fault(value, before, must_equal):
    """What is wrong with the outcome of a reader on damaged bytes; "" if nothing."""
    if isinstance(value, Exception):
        words = f"{type(value).__name__}: {str(value)[:200]!r}"
        return "" if is_sentence(value) else words
    if must_equal and value is not None and not same(value, before):
        return "other bytes are read as if nothing was"
    return ""


VALUES = [None, True, False, 0, 1, -1, 2**64, 1e308, float("nan"), float("inf"), "", "nan", "1e-4",
          "1e999", "none", "a" * 300, "\x00", "~", "../..", [], [1], {}, {"a": 1}, "paper", "cuda:9",
          "regdb", "afen", "xmodal", 3, 0.5, "layer3"]  # fmt: skip


def draw_parameters(rng):
    """Some parameters with values of every type, a few under no known name."""
    names = [*runs.PARAMETERS, "epoch", "Seed", "", "x y"]
    chosen = rng.choice(names, size=rng.integers(1, 3), replace=False).tolist()
    sane = lambda name: runs.DEFAULTS.get(name) if rng.random() < 0.5 else 2
    odd = rng.random(len(chosen)) < 0.7
    return {
        name: VALUES[rng.integers(len(VALUES))] if strange else sane(name)
        for name, strange in zip(chosen, odd)
    }


def try_parameters(rng):
    """A plan from random parameters: it is made, or refused in a sentence."""
    given = draw_parameters(rng)
    value = read(lambda: runs.check_switches(runs.make_plan(runs.DEFAULTS | given)))
    words = fault(value, None, False)
    return f"{words} for {given}" if words else "", isinstance(value, Exception)


def fuzz(folder, seconds, seed, tries=None):
    """Every reader in turn until the time is over; counts and faults."""
    folder.mkdir(exist_ok=True)
    every = readers(folder)
    whole = {name: file.read_bytes() for name, (file, _, _) in every.items()}
    before = {name: read(reader) for name, (_, reader, _) in every.items()}
    unread = [name for name, value in before.items() if isinstance(value, Exception)]
    assert not unread, f"not read while they are whole: {unread}"
    counts, refused, faults = Counter(), Counter(), {}
    until, number = time.monotonic() + seconds, 0
    while time.monotonic() < until and (tries is None or number < tries):
        rng = keyed_rng("fuzz", seed, number)
        for name, (file, reader, must_equal) in every.items():
            if number % SELDOM.get(name, 1):
                continue
            file.write_bytes(damage(whole[name], rng))
            value = read(reader)
            counts[name] += 1
            refused[name] += isinstance(value, Exception)
            if words := fault(value, before[name], must_equal):
                faults.setdefault(f"{name}: {words}", number)
            file.write_bytes(whole[name])
        words, was_refused = try_parameters(rng)
        counts["parameters"] += 1
        refused["parameters"] += was_refused
        if words:
            faults.setdefault(f"parameters: {words}", number)
        number += 1
    return {
        "asked_for": f"{seconds / 60:g} minutes",
        "inputs": sum(counts.values()),
        "readers": dict(counts),
        "refused": dict(refused),
        "faults": [f"{words} (number {n})".replace(str(folder), "") for words, n in faults.items()],
    }


def properties(seconds, seed, examples=100):
    """Hypothesis over tests/test_properties.py, with other examples each time."""
    until, total, faults, rounds = time.monotonic() + seconds, 0, [], 0
    env = os.environ | {"EXAMPLES": str(examples)}
    words = [sys.executable, "-m", "pytest", "tests/test_properties.py", "-q", "-p",
             "no:cacheprovider", "--hypothesis-show-statistics"]  # fmt: skip
    tests = set()
    while time.monotonic() < until and not faults:
        command = [*words, f"--hypothesis-seed={seed + rounds}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
        total += sum(map(int, re.findall(r"(\d+) passing examples", done.stdout)))
        tests |= set(re.findall(r"^(tests/\S+::\S.*):$", done.stdout, re.M))
        faults += re.findall(r"^FAILED .*|^E  .*", done.stdout, re.M)[:5]
        if done.returncode and not faults:
            faults.append(done.stdout[-300:] + done.stderr[-300:])
        rounds += 1
    return {"asked_for": f"{seconds / 60:g} minutes", "properties": len(tests), "rounds": rounds,
            "examples": total, "faults": faults}  # fmt: skip


if __name__ == "__main__":  # a look at one part: python -m tests.long_fuzz SECONDS
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(fuzz(Path(name), float(sys.argv[1]), 0), indent=1))
