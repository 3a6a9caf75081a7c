"""The grid: names, commands, order, costs, and results from records."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from papermill.cli import _resolve_type

from afen import grid
from afen.backbone import count_parameters
from afen.method import create, method_names
from afen.records import run_id
from afen.runs import DEFAULTS, make_plan
from afen.tables import published

ROOT = Path(__file__).resolve().parent.parent
POCKET_JOBS = grid.jobs()


def test_runs_keep_their_names():
    """A new switch or default would rename every kept record."""
    given = DEFAULTS | {"precision": "bfloat16"}
    expected = "pocket-regdb-afen-pocket-t1-s0-5a6c7e74"
    assert run_id(make_plan(given).parameters) == expected
    full = {job.id for job in POCKET_JOBS if job.label == grid.FULL and job.seed == 0}
    assert expected in full


def test_every_row_is_a_method():  # whoever adds a method need not add a row
    assert set(published()["method"]) <= set(grid.METHODS) <= set(method_names())


@pytest.mark.parametrize("group", grid.GRID, ids=lambda group: group.name)
def test_cells_of_a_group_are_different_runs(group):
    assert group.reference in group.cells
    ids = {}
    for job in POCKET_JOBS:
        if (job.group, job.dataset, job.seed) == (group, "pocket-regdb", 0):
            ids.setdefault(job.id, []).append(job.label)
    same = [labels for labels in ids.values() if len(labels) > 1]
    # the pocket recipe erases nothing, the paper's erases half
    assert same == ([["as it stands", "erasing 0"]] if group is grid.RECIPE else [])


def test_papermill_reads_what_the_grid_means():
    for job in grid.runs_of(POCKET_JOBS).values():
        words, read = job.arguments(), {}
        while words:
            flag, word, *words = words
            if flag == "-y":
                read |= yaml.safe_load(word)
            else:
                assert flag == "-p"
                value, *words = words
                read[word] = _resolve_type(value)
        assert run_id(make_plan(DEFAULTS | read).parameters) == job.id


def test_order_is_by_group_then_seed():
    place = [(grid.GRID.index(job.group), job.seed) for job in POCKET_JOBS]
    assert place == sorted(place)
    assert [name for name in grid.runs_of(POCKET_JOBS)][0] == POCKET_JOBS[0].id


def test_the_preset_alone_leads_to_real_data():
    rows = grid.jobs("paper")
    assert {job.seed for job in rows} == {0}
    assert {job.seed for job in grid.jobs("paper", ["ablation"])} == {0, 1, 2}
    assert len(rows) == len(grid.runs_of(rows)) == len(grid.METHODS) * (1 + 10)
    assert {job.parameters["preset"] for job in rows} == {"paper"}
    ablation = grid.jobs("paper", ["ablation"], seeds=[0, 1])
    places = {(job.dataset, job.split) for job in ablation if job.group is grid.CORE}
    assert places == {("sysu", 1), *(("regdb", trial) for trial in range(1, 11))}


@pytest.mark.parametrize("word", ["preset", "study"])
def test_a_wrong_name_is_told(word):
    with pytest.raises(ValueError, match=f"Unknown {word} 'papr'"):
        grid.jobs("papr") if word == "preset" else grid.jobs(studies=["papr"])


@pytest.mark.parametrize("module", ["MECS", "FEM", "both"])
@pytest.mark.parametrize("preset", ["pocket", "paper"])
def test_controls_have_the_size_of_what_they_control(module, preset):
    def size(label):
        cells = grid.CORE.cells
        plan = make_plan(DEFAULTS | dict(cells[label], preset=preset, weights="none"))
        return count_parameters(create("afen", 8, plan.recipe, **plan.options))

    base = size("base")
    own = size(grid.FULL if module == "both" else module) - base
    control = size(f"control for {module}") - base
    assert abs(control / own - 1) < 0.01


def test_a_kept_run_of_another_data_set_is_no_basis_for_a_cost():
    """LLCM and one's own crops are in no plan, and their length is not known."""
    jobs = grid.jobs("paper", ["rows"])[:1]
    for name in ("llcm", "folder"):
        parameters = jobs[0].parameters | {"dataset": name}
        other = {"id": name, "status": "partial", "parameters": parameters}
        assert grid.plan(jobs, [other]).minutes.isna().all()


def record(job, status="smoke", value=0.5):
    """What tables read of a record."""
    mean = {"mean": dict.fromkeys(grid.METRICS, value)}
    settings = grid.SETTINGS[job.dataset.removeprefix("pocket-")]
    scores = dict.fromkeys(settings, mean) if status == "smoke" else {}
    return {"id": job.id, "status": status, "scores": scores}


def test_results_show_what_is_missing_and_what_failed():
    cells = [j for j in POCKET_JOBS if (j.group, j.dataset) == (grid.LOSSES, "pocket-regdb")]
    kept = [record(cells[0]), record(cells[1], "failed")]
    table = grid.results("ablation", "pocket-regdb", kept)
    table = table[table.group == grid.LOSSES.name]
    assert len(table) == len(cells) * len(grid.METRICS) * 2
    status = table.drop_duplicates("id").set_index("id").status
    assert status[cells[0].id] == "smoke" and status[cells[1].id] == "failed"
    assert (status.drop([c.id for c in cells[:2]]) == "not run").all()
    assert table.value.notna().equals(table.status == "smoke")


def test_differences_are_paired_by_seed():
    cells = [j for j in POCKET_JOBS if (j.group, j.dataset) == (grid.LOSSES, "pocket-regdb")]
    base = {0: 0.5, 1: 0.6, 2: 0.7}
    kept = [
        record(job, value=base[job.seed] + (0.1 if job.label == "WRT" else 0))
        for job in cells
        if job.label != "L_sq, released" and (job.label, job.seed) != ("WRT", 1)
    ]
    table = grid.results("ablation", "pocket-regdb", reversed(kept))
    gaps = grid.differences(table[table.group == grid.LOSSES.name])
    wrt = gaps[(gaps.label == "WRT") & (gaps.metric == "mAP")]
    assert wrt[wrt.seed != 1].difference.tolist() == [0.1] * 4
    assert wrt[wrt.seed == 1].difference.isna().all()
    assert (gaps[gaps.label == grid.LOSSES.reference].difference == 0).all()
    assert gaps[gaps.label == "L_sq, released"].difference.isna().all()
    other = grid.differences(table[table.group == grid.LOSSES.name], "WRT")
    stable = other[(other.label == "L_sq, stable") & (other.seed == 0)]
    assert (stable.difference == -0.1).all()


@pytest.mark.parametrize("name, wrong, right", [
    ("claims", "kep", "kept"), ("ablation", "recods", "records"),
])  # fmt: skip
def test_an_unknown_parameter_stops_a_page(tmp_path, name, wrong, right):
    papermill = Path(sys.executable).with_name("papermill")
    words = [papermill, "--no-progress-bar", f"nbs/{name}.ipynb", tmp_path / "out.ipynb"]
    words += ["-p", wrong, "x"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and f"did you mean '{right}'" in done.stderr


def test_the_plan_knows_each_method_by_its_own_network():
    """PMT's transformer grows faster than a ResNet, DART has two networks."""
    rows = {
        (job.label, preset): job.parameters
        for preset in ("pocket", "paper")
        for job in grid.jobs(preset, ["rows"])
    }
    work = {name: grid.step_work(parameters) for name, parameters in rows.items()}
    growth = {n: work[n, "paper"] / work[n, "pocket"] for n in ("agw", "pmt")}
    assert growth["pmt"] > 3 * growth["agw"]
    assert 1.9 < work["dart", "pocket"] / work["agw", "pocket"] < 2.1


def test_two_steps_at_the_papers_size_price_every_row():
    paper = set(published()["method"])
    rows = [job for job in grid.jobs("paper") if job.parameters["method"] in paper]
    plan = grid.plan(rows, grid.timed_records())
    assert len(plan) == 8 * (1 + 10)
    assert plan["basis"].str.startswith("measured").all()
    assert (plan["s/step"] > 0).all()
