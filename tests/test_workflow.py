"""The workflow: what it would run, what it runs, and how it survives a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import nbformat
import psutil
import pytest
from test_tables import differing

from afen import grid
from afen.core import digest
from afen.people import write_tree
from afen.records import OVER, fingerprint, new_record, read_record, score_entry
from afen.tables import write_block

ROOT = Path(__file__).resolve().parent.parent
SNAKEMAKE = Path(sys.executable).with_name("snakemake")
QUICK = {"preset": "pocket", "epochs": 8, "steps": 2, "identities": 2, "images": 2}
QUICK |= {"precision": "float32", "device": "cpu"}


def project(folder):
    """A folder that stands in for the checkout: its own data, runs and records."""
    (folder / "data" / "records").mkdir(parents=True)
    for name in ("nbs", "workflow", "data/trunks"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("settings.ini", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def words(*targets, profile="local", **config):
    """The command that `make reproduce` runs."""
    given = [f"{k}={v}" for k, v in ({"preset": "pocket"} | config).items()]
    return [
        str(SNAKEMAKE), *targets, "--snakefile", "workflow/Snakefile",
        "--profile", f"workflow/profiles/{profile}", "--config", *given,
    ]  # fmt: skip


def call(folder, *targets, **choice):
    """Run the workflow to its end; returns the process, all its text in stdout."""
    return subprocess.run(
        words(*targets, **choice), cwd=folder, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@cache
def begun(dataset):
    """The record of a run that has only begun, to be filled in."""
    (job, *_) = [j for j in grid.jobs(studies=["rows"]) if j.dataset == dataset]
    return new_record(job.parameters, {"hash": "", "protocol": "", "rendered": True})


def finish(job, folder):
    """Write the record that the job would leave, with made-up scores."""
    layout = job.dataset.removeprefix("pocket-")
    names = (*grid.METRICS, "rank5")
    mean = {name: {"mean": 0.5, "std": None} for name in names}
    entry = score_entry(mean, [dict.fromkeys(names, 0.5)], OVER[layout], 9, 9)
    record = begun(job.dataset) | {"id": job.id, "status": "smoke", "reason": "made up"}
    record |= {"parameters": dict(job.parameters), "parameters_hash": digest(job.parameters)}
    record |= {"scores": dict.fromkeys(grid.SETTINGS[layout], entry)}
    record["machine"] = record["machine"] | {"seconds": 99.0}
    record["fingerprint"] = fingerprint(record)
    (folder / f"{job.id}.json").write_text(json.dumps(record))


def planned(text):
    """The runs that a dry run lists, with what it says of each."""
    lines = [line.split(": ", 2) for line in text.splitlines() if line.startswith("Job ")]
    return {line[1]: line[2] for line in lines if len(line) == 3 and " steps x" in line[2]}


def test_only_what_has_no_record_is_planned(tmp_path):
    folder = project(tmp_path)
    runs = list(grid.runs_of(grid.jobs()).values())
    for job in runs:
        finish(job, folder / "data" / "records")
    gone = next(j for j in runs if j.label == "average" and j.seed == 5)
    (folder / "data" / "records" / f"{gone.id}.json").unlink()
    done = call(folder, "-n", preset="pocket")
    assert done.returncode == 0, done.stdout[-2000:]
    listed = planned(done.stdout)
    assert set(listed) == {gone.id}
    assert listed[gone.id].startswith("99 steps x 1 s + 75 s = 2.9 min (measured, cpu: ")
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith(f"{len(runs)} runs: {len(runs) - 1} smoke, 1 to run. Left: 0.0 h")


def test_a_fresh_clone_of_this_repository_trains_nothing_that_has_a_record(tmp_path):
    folder = project(tmp_path)
    shutil.copytree(ROOT / "data" / "records", folder / "data" / "records", dirs_exist_ok=True)
    for i, path in enumerate(sorted((folder / "data" / "records").rglob("*.json"))):
        os.utime(path, (1e9 + i % 7, 1e9 + i % 7))  # times are arbitrary after a clone
    done = call(folder, "-n", preset="pocket")
    assert done.returncode == 0, done.stdout[-2000:]
    kept = {path.stem for path in (folder / "data" / "records").glob("*.json")}
    assert set(planned(done.stdout)) == set(grid.runs_of(grid.jobs())) - kept


def test_the_plan_on_real_data_for_a_cluster(tmp_path):
    folder = project(tmp_path)
    finish(grid.jobs(studies=["rows"])[0], folder / "data" / "records")
    done = call(folder, "-n", profile="slurm", preset="paper")
    assert done.returncode == 0, done.stdout[-2000:]
    listed = planned(done.stdout)
    assert len(listed) == len(grid.METHODS) * (1 + 10)
    assert sum(name.startswith("sysu-") for name in listed) == len(grid.METHODS)
    assert all("estimated by multiply-adds, cpu: " in cost for cost in listed.values())


def test_who_has_one_data_set_gets_its_runs_and_all_pages(tmp_path):
    folder = project(tmp_path)
    finish(grid.jobs(studies=["rows"])[0], folder / "data" / "records")  # a cost
    done = call(folder, "-n", preset="paper", datasets="regdb")
    assert done.returncode == 0, done.stdout[-2000:]
    listed = planned(done.stdout)
    assert len(listed) == len(grid.METHODS) * 10
    assert all(name.startswith("regdb-") for name in listed)
    for page in ("ablation", "claims", "table1", "decisions", "index"):
        assert f"runs/reproduce/{page}.ipynb: tables" in done.stdout
    nothing = call(folder, "-n", preset="paper", datasets="none").stdout
    assert not planned(nothing) and "runs/reproduce/table1.ipynb: tables" in nothing
    wrong = call(folder, "-n", preset="paper", datasets="regbd")
    assert wrong.returncode != 0 and "did you mean 'regdb'" in wrong.stdout


def test_a_run_of_another_study_is_probed_when_it_is_trained(tmp_path):
    done = call(project(tmp_path), "-n", "-p", studies="rows")
    for job in grid.jobs(studies=["rows"]):
        probed = f"afen.probes runs/{job.id} " in done.stdout
        assert probed == (job.label == "afen"), job.id


def test_weights_at_hand_are_probed_before_the_claims_are_made(tmp_path):
    folder = project(tmp_path)
    jobs = [job for job in grid.jobs(studies=["ablation"]) if job.label == "WRT"]
    for job in jobs:
        finish(job, folder / "data" / "records")
    (folder / "runs" / jobs[0].id).mkdir(parents=True)
    (folder / "runs" / jobs[0].id / "weights.safetensors").touch()
    done = call(folder, "-n", "runs/reproduce/claims.ipynb", datasets="none")
    ending = ": what its modules do"
    lines = [line for line in done.stdout.splitlines() if line.endswith(ending)]
    assert len(lines) == 1 and jobs[0].id in lines[0]


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """A copy without figures and without the README's block, in which both are made."""
    copy = tmp_path_factory.mktemp("copy")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("figures/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    write_block(copy / "README.md", "state", "deleted")
    environment = os.environ | {"PYTHONPATH": str(copy)}
    where = [sys.executable, "-c", "import afen; print(afen.__file__)"]
    found = subprocess.run(where, cwd=copy, env=environment, capture_output=True, text=True)
    assert Path(found.stdout).is_relative_to(copy), "the package is not the copy's"
    done = subprocess.run(
        words(datasets="none"), cwd=copy, env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    return copy


@pytest.mark.parametrize("pattern", [
    "smoke_ablation*", "smoke_claims*", "smoke_pocket*", "smoke_paper_size*", "table1*",
])  # fmt: skip
def test_deleted_figures_are_made_again(reproduced, pattern):
    """From the committed records: equal bytes, and nearly equal pixels of pictures."""
    assert differing(reproduced / "figures", ROOT / "figures", pattern) == []


def test_the_deleted_block_is_made_again(reproduced):
    assert (reproduced / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()


def said(path):
    """What a notebook's cells print, and their tables."""
    book = nbformat.read(path, as_version=4)
    outputs = [o for cell in book.cells for o in cell.get("outputs", [])]
    printed = "".join(o.text for o in outputs if o.output_type == "stream")
    kinds = ("text/html", "text/markdown")
    shown = [o.data[kind] for o in outputs if "data" in o for kind in kinds if kind in o.data]
    return [line for line in printed.splitlines() if line], shown


@pytest.mark.parametrize("name", ["ablation", "claims"])
def test_a_committed_page_says_what_the_records_give(reproduced, name):
    made = said(reproduced / "runs" / "reproduce" / f"{name}.ipynb")
    assert made[1] and made == said(ROOT / "nbs" / f"{name}.ipynb")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A small rendered tree in RegDB's layout; its second split is broken."""
    tree = tmp_path_factory.mktemp("tree") / "regdb"
    write_tree("regdb", tree, n_train=4, n_test=4, n_images=2, size=(48, 24))
    (tree / "idx" / "train_visible_2.txt").write_text("nowhere.bmp 0\n")
    return tree


def two_runs(tree, methods, trials=(1, 1), **changes):
    """The arguments that make just two short runs, and the records they will leave."""
    common = {"root": str(tree), **QUICK, **changes}
    config = tree.parent / f"{'-'.join(methods)}.json"
    config.write_text(json.dumps({"studies": "rows", "common": common}))
    every = grid.jobs("paper", ["rows"], common=common)
    found = [
        next(j for j in every if (j.label, j.dataset, j.split) == (method, "regdb", trial))
        for method, trial in zip(methods, trials)
    ]
    records = [f"data/records/{job.id}.json" for job in found]
    return [*records, "--cores", "1", "--configfile", str(config)], records


def kill(process):
    """Kill a process and all that it has started."""
    family = psutil.Process(process.pid).children(recursive=True)
    for one in (process, *map(psutil.Process, [p.pid for p in family if p.is_running()])):
        one.kill()


def interrupt(process):
    """What Ctrl-C in a terminal does."""
    os.killpg(process.pid, signal.SIGINT)


def heed_interrupts():
    """As in a terminal: whoever starts the tests behind `&` has SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("stop", (kill, interrupt))
def test_a_stopped_workflow_goes_on_where_it_stopped(tree, tmp_path, stop):
    folder = project(tmp_path)
    arguments, records = two_runs(tree, ("agw", "caj"))
    command = words(*arguments, preset="paper")
    process = subprocess.Popen(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, preexec_fn=heed_interrupts,
    )  # fmt: skip
    paths = [folder / record for record in records]
    deadline = time.time() + 600

    def in_the_second_run():
        if sum(path.exists() for path in paths) != 1:
            return False
        name = next(path.stem for path in paths if not path.exists())
        return (folder / "runs" / name / "checkpoint.pt").exists()

    while not in_the_second_run():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    stop(process)
    process.wait()
    kept = next(path for path in paths if path.exists())
    before = kept.read_bytes()
    assert sum(path.exists() for path in paths) == 1, "an unfinished run was kept"
    done = call(folder, *arguments, preset="paper")
    assert done.returncode == 0, done.stdout[-2000:]
    assert kept.read_bytes() == before, "the finished run was made again"
    other = next(path for path in paths if path != kept)
    assert read_record(other)["status"] == "smoke"
    assert "Going on from epoch" in (folder / "runs" / f"{other.stem}.ipynb").read_text()


def test_a_failed_run_is_kept_and_stops_no_other(tree, tmp_path):
    folder = project(tmp_path)
    arguments, records = two_runs(tree, ("agw", "agw"), (1, 2), lr=1e30, clip=1e30)
    done = call(folder, *arguments, preset="paper")
    assert done.returncode != 0  # the second could not begin: its split is broken
    record = read_record(folder / records[0])
    assert record["status"] == "failed" and "became" in record["reason"]
    assert not (folder / records[1]).exists()
    assert "did not begin" in done.stdout and "train_visible_2.txt" in done.stdout


def test_two_runs_never_share_a_gpu(tmp_path):
    script = ["sh", str(ROOT / "workflow" / "on_gpu.sh"), "2"]
    shows = ["sh", "-c", "echo $CUDA_VISIBLE_DEVICES; read end"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    taken = [subprocess.Popen([*script, *shows], cwd=tmp_path, **pipes) for _ in range(2)]
    assert {process.stdout.readline() for process in taken} == {"0\n", "1\n"}
    third = subprocess.run([*script, "true"], cwd=tmp_path, capture_output=True, text=True)
    assert third.returncode == 1 and "All 2 GPUs are taken" in third.stderr
    for process in taken:
        process.communicate("\n")
    assert subprocess.run([*script, "true"], cwd=tmp_path).returncode == 0


def test_of_a_shared_machine_only_the_given_gpus_are_taken(tmp_path):
    script = ["sh", str(ROOT / "workflow" / "on_gpu.sh"), "2"]
    shows = ["sh", "-c", "echo $CUDA_VISIBLE_DEVICES; read end"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    pipes["env"] = os.environ | {"CUDA_VISIBLE_DEVICES": "5,GPU-7a"}
    taken = [subprocess.Popen([*script, *shows], cwd=tmp_path, **pipes) for _ in range(2)]
    assert {process.stdout.readline() for process in taken} == {"5\n", "GPU-7a\n"}
    for process in taken:
        process.communicate("\n")


@pytest.mark.parametrize("cores, gpus, at_once", [(12, 8, 8), (30, 8, 8), (1, 2, 1)])
def test_no_more_runs_at_once_than_gpus(tmp_path, cores, gpus, at_once):
    folder = project(tmp_path)
    finish(grid.jobs(studies=["rows"])[0], folder / "data" / "records")  # a cost
    done = call(folder, "-n", "--cores", str(cores), studies="rows", gpus=gpus)
    assert done.returncode == 0, done.stdout[-2000:]
    last = done.stdout.strip().splitlines()[-1]
    assert f" with {at_once} at a time, if" in last


def test_a_run_asks_the_cluster_for_one_gpu(tmp_path):
    folder, tools = project(tmp_path), tmp_path / "bin"
    tools.mkdir()
    asked = tmp_path / "asked.txt"
    answers = {"sbatch": f'echo "$@" > {asked}; exit 1', "sacctmgr": "echo us"}
    for name in ("sbatch", "sacctmgr", "sshare", "sinfo", "scontrol", "squeue", "scancel"):
        (tools / name).write_text(f"#!/bin/sh\n{answers.get(name, 'echo us')}\n")
        (tools / name).chmod(0o755)
    record = f"data/records/{grid.jobs('paper', ['rows'])[0].id}.json"
    resources = ["--default-resources", "slurm_account=us", "slurm_partition=gpu"]
    command = words(record, *resources, profile="slurm", preset="paper")
    environment = {"PYTHONPATH": str(ROOT), "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode != 0  # nothing was submitted
    for need in ("-A us", "-p gpu", "--gpus=1", "--cpus-per-task=4", "--mem 16000"):
        assert need in asked.read_text()
