"""The grid: names, commands, order, costs, and results from records."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from papermill.cli import _resolve_type

from afen import grid
from afen.backbone import count_parameters, trunk_files
from afen.method import create, method_names
from afen.records import load_records, run_id
from afen.runs import DEFAULTS, make_plan
from afen.tables import published
from afen.verdicts import effect

ROOT = Path(__file__).resolve().parent.parent
POCKET_JOBS = grid.jobs()


def test_runs_keep_their_names():
    """A new switch or default would rename every kept record."""
    given = DEFAULTS | {"seed": 4}
    expected = "pocket-regdb-afen-pocket-t1-s4-ead6d3dc"
    assert run_id(make_plan(given).parameters) == expected
    full = {job.id for job in POCKET_JOBS if job.label == grid.FULL and job.seed == 4}
    assert expected in full


def test_every_row_is_a_method():  # whoever adds a method need not add a row
    assert set(published()["method"]) <= set(grid.METHODS) <= set(method_names())


@pytest.mark.parametrize("group", grid.GRID, ids=lambda group: group.name)
def test_cells_of_a_group_are_different_runs(group):
    assert group.reference in group.cells
    ids = {}
    for job in POCKET_JOBS:
        if (job.group, job.dataset, job.seed) == (group, "pocket-regdb", first_seed(group)):
            ids.setdefault(job.id, []).append(job.label)
    assert [labels for labels in ids.values() if len(labels) > 1] == []
    assert len(ids) == len(group.cells) >= 2


@pytest.fixture(scope="module")
def kept():
    """The grid's cells of both pocket sets, with the kept records' scores."""
    records = load_records()
    sets = [name for name, _ in grid.PRESETS["pocket"].sets.values()]
    parts = [
        grid.results(study, name, records).assign(dataset=name)
        for study in grid.STUDIES for name in sets
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize("group", grid.GRID, ids=lambda group: group.name)
def test_no_kept_comparison_is_of_a_run_with_itself(group, kept):
    """A change that changes nothing, under a name of its own, would be "no effect of size"."""
    for dataset, points in grid.run_points(kept, group).groupby(level="dataset"):
        for label, reference in group.comparisons():
            apart = (points[label] - points[reference]).dropna()
            assert apart.empty or (apart != 0).any(), (dataset, label)


def test_seeds_that_share_a_trunk_are_one_number(kept):
    rows = grid.group_verdicts(kept, grid.ROWS).set_index(["dataset", "label"])
    seeds = len(grid.PRESETS["pocket"].seeds_of(grid.ROWS))
    assert (rows.n.drop("pmt", level="label") == seeds).all()
    assert (rows.n.xs("pmt", level="label") == len(trunk_files("vit"))).all()
    assert len(trunk_files("vit")) < seeds


def first_seed(group):
    return grid.PRESETS["pocket"].seeds_of(group)[0]


@pytest.mark.parametrize("group", grid.GRID, ids=lambda group: group.name)
def test_a_family_compares_cells_that_are_there(group):
    pairs = group.comparisons()
    assert len(set(pairs)) == len(pairs) and len(pairs) >= len(group.cells) - 1
    assert {label for pair in pairs for label in pair} == set(group.cells)
    assert all(label != reference for label, reference in pairs)


def test_the_rule_is_chosen_on_other_trunks_than_it_is_tested_on():
    chosen = grid.PRESETS["pocket"].seeds_of(grid.JOINING)
    tested = {s for g in grid.GRID if g is not grid.JOINING
              for s in grid.PRESETS["pocket"].seeds_of(g)}  # fmt: skip
    assert not tested & set(chosen) and len(tested) >= 6
    trunks = max(*tested, *chosen) + 1  # a seed's trunk is the seed modulo their number
    assert len({seed % trunks for seed in (*tested, *chosen)}) == len(tested) + len(chosen)


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
        cells = grid.CORE.cells | grid.CONTROLS.cells
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
    first, second, *others = grid.PRESETS["pocket"].seeds_of(grid.LOSSES)
    kept = [
        record(job, value=job.seed / 20 + (0.1 if job.label == "WRT" else 0))
        for job in cells
        if job.label != "L_sq, released" and (job.label, job.seed) != ("WRT", second)
    ]
    table = grid.results("ablation", "pocket-regdb", reversed(kept))
    gaps = grid.differences(table[table.group == grid.LOSSES.name])
    wrt = gaps[(gaps.label == "WRT") & (gaps.metric == "mAP")]
    assert wrt[wrt.seed != second].difference.tolist() == [0.1] * 2 * (1 + len(others))
    assert wrt[wrt.seed == second].difference.isna().all()
    assert (gaps[gaps.label == grid.LOSSES.reference].difference == 0).all()
    assert gaps[gaps.label == "L_sq, released"].difference.isna().all()
    other = grid.differences(table[table.group == grid.LOSSES.name], "WRT")
    stable = other[(other.label == "L_sq, stable") & (other.seed == first)]
    assert (stable.difference == -0.1).all()


def core_table(effects, missing=()):
    """Results of the modules' group: mAP 50 and one point per seed, and a cell's effect.

    The two settings lie a point below and above; `missing` are (label, data set, seed).
    """
    records = []
    for job in POCKET_JOBS:
        if job.group is not grid.CORE or (job.label, job.dataset, job.seed) in missing:
            continue
        value = 50 + job.seed + effects.get(job.label, lambda seed: 0.0)(job.seed)
        shown = [s for s in grid.SETTINGS[job.dataset.removeprefix("pocket-")]
                 if s in grid.SHOWN]  # fmt: skip
        each = {s: {"mean": {"mAP": (value + shift) / 100}} for s, shift in zip(shown, (-1, 1))}
        records.append({"id": job.id, "status": "smoke", "scores": each})
    return pd.concat([
        grid.results("ablation", name, records).assign(dataset=name)
        for name in ("pocket-regdb", "pocket-sysu")
    ])


def by_seed(mean):
    """An effect of a mean over the seeds, a tenth of a point to either side in turn."""
    return lambda seed: mean + (0.1 if seed % 2 else -0.1)


def test_a_group_is_judged_as_one_family():
    effects = {"MECS": by_seed(2.0), "FEM": by_seed(-2.0), grid.FULL: by_seed(0.0)}
    table = core_table(effects)
    points = grid.run_points(table, grid.CORE)
    seed = first_seed(grid.CORE)
    assert points.loc[("pocket-regdb", 1, seed), "base"] == pytest.approx(50 + seed)
    verdicts = grid.group_verdicts(table, grid.CORE)
    seeds, comparisons = grid.PRESETS["pocket"].seeds_of(grid.CORE), grid.CORE.comparisons()
    assert len(verdicts) == 2 * len(comparisons) and (verdicts.n == len(seeds)).all()
    one = verdicts[verdicts.dataset == "pocket-sysu"].set_index(["label", "reference"])
    assert list(one.index) == comparisons
    said = {"MECS": "supported", "FEM": "contradicted", grid.FULL: "no effect of size"}
    for label, verdict in said.items():
        assert one.verdict[label, "base"] == verdict
    assert one["mean"]["MECS", "base"] == pytest.approx(2.0)
    assert one.low["MECS", "base"] < 2.0 < one.high["MECS", "base"]


def test_seeds_of_one_split_are_no_units_of_their_own():
    """RegDB has ten splits: three seeds of each are ten numbers, not thirty."""
    rows = [
        {"group": "modules", "dataset": "regdb", "split": split, "seed": seed, "label": label,
         "setting": grid.SHOWN[0], "metric": "mAP",
         "value": 0.5 + (label != "base") * (1 + split % 2) / 100}
        for split in range(1, 11)
        for seed in range(3)
        for label in grid.CORE.cells
    ]  # fmt: skip
    one = grid.group_verdicts(pd.DataFrame(rows), grid.CORE).set_index(["label", "reference"])
    found = one.loc[("MECS", "base")]
    want = effect(np.array([1.0, 2.0] * 5))
    assert found.n == 10 and found.low == pytest.approx(want.low)


def test_a_study_that_a_preset_cannot_run_is_refused(capsys):
    with pytest.raises(SystemExit):
        grid.main(["jobs", "--preset", "paper", "--study", "start"])
    assert "Preset 'paper' cannot run study 'start': leave it out." in capsys.readouterr().err


def test_a_comparison_that_lacks_a_run_is_not_judged():
    seed = first_seed(grid.CORE)
    effects = {"MECS": by_seed(2.0), "FEM": by_seed(2.0)}
    table = core_table(effects, missing={("MECS", "pocket-regdb", seed)})
    verdicts = grid.group_verdicts(table, grid.CORE).set_index(["dataset", "label", "reference"])
    lacks = verdicts.loc[("pocket-regdb", "MECS", "base")]
    n = len(grid.PRESETS["pocket"].seeds_of(grid.CORE))
    assert (lacks.verdict, lacks.n) == ("not run", n - 1)
    assert lacks[["mean", "low", "high"]].isna().all()
    others = verdicts.drop(index=("pocket-regdb", "MECS", "base"))
    assert (others.n == n).all() and "not run" not in set(others.verdict)
    nothing = grid.group_verdicts(table.assign(value=float("nan")), grid.CORE)
    assert set(nothing.verdict) == {"not run"} and (nothing.n == 0).all()


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
