"""The claims: the rule against cases, measures by hand, findings of made-up runs."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from afen import claims, grid
from afen.probes import BANDS, load_probes
from afen.records import load_records
from afen.verdicts import SIZE, VERDICTS, effect

ROOT = Path(__file__).resolve().parent.parent
INDEX = pd.MultiIndex.from_product([["a", "b"], [1], [0, 1, 2]], names=claims.KEYS)
WORDS = ("supported", "contradicted", "no effect of size", "inconclusive", "not run")


def values(*numbers):
    """Numbers on data set a, and on b if there are six."""
    return pd.Series(numbers, INDEX[: len(numbers)], dtype=float)


def a_test(*numbers, size=SIZE, name="", claim=0):
    """A test of these numbers, no module idle."""
    made_up = values(*numbers)
    return claims.Test(claim, name, made_up, made_up.isna() & False, size)


@pytest.mark.parametrize("numbers, size, word", [
    ((4, 4.1, 3.9), SIZE, "supported"),
    ((0.4, 0.41, 0.39), SIZE, "supported"),  # a small effect, and a sure one
    ((-4, -4.1, -3.9), SIZE, "contradicted"),
    ((0.02, 0.01, -0.02), SIZE, "no effect of size"),
    ((0.02, 0.01, -0.02), None, "inconclusive"),
    ((4, 1, -1), SIZE, "inconclusive"),
    ((4, 4.1, np.nan), SIZE, "inconclusive"),
    ((np.nan,) * 3, SIZE, "not run"),
])  # fmt: skip
def test_the_rule_on_one_data_set(numbers, size, word):
    (row,) = claims.judge([a_test(*numbers, size=size)]).to_dict("records")
    assert row["verdict"] == word
    assert row["n"] == sum(np.isfinite(numbers)) and row["missing"] == 3 - row["n"]


def test_the_interval_is_that_of_the_verdicts():
    (row,) = claims.judge([a_test(0.9, 1.7, 0.2)]).to_dict("records")
    one = effect(np.array([0.9, 1.7, 0.2]))
    assert all(row[k] == v for k, v in one._asdict().items())


def test_the_tests_of_a_claim_are_a_family():
    good, nothing = (1.0, 1.2, 0.9), (1.0, -1.0, 0.1)
    alone = claims.judge([a_test(*good, name="x")])
    family = claims.judge([a_test(*good, name="x"), a_test(*nothing, *nothing, name="y")])
    apart = claims.judge([a_test(*good, name="x"), a_test(*nothing, name="y", claim=1)])
    assert family.zero[0] == pytest.approx(3 * alone.zero[0])
    assert apart.zero[0] == alone.zero[0] == alone.p_zero[0]


def test_what_is_not_run_counts_in_the_family():
    tests = [a_test(1.0, 1.2, 0.9, name="x"), a_test(*[np.nan] * 3, name="y")]
    judged = claims.judge(tests)
    assert judged.zero[0] == pytest.approx(2 * judged.p_zero[0])
    assert judged.verdict[1] == "not run"


def test_a_test_without_size_is_no_part_of_the_family_of_sizes():
    tests = [a_test(0.1, 0.2, -0.1, name="x"), a_test(1, 2, 3, size=None, name="y")]
    judged = claims.judge(tests)
    assert judged["size"][0] == judged.p_size[0] and np.isnan(judged["size"][1])


def test_seeds_of_a_split_are_one_number_where_there_are_splits():
    splits = pd.MultiIndex.from_product([["a"], [1, 2, 3], [0, 1]], names=claims.KEYS)
    numbers = pd.Series([1, 3, 2, 2, 4, np.nan], splits)
    assert grid.by_unit(numbers).tolist() == [2, 2, 4]
    test = claims.Test(0, "", numbers, numbers.isna() & False, SIZE)
    (row,) = claims.judge([test]).to_dict("records")
    assert (row["n"], row["missing"]) == (3, 1)


def test_an_idle_test_is_inconclusive():
    change = values(0.009, 0.02, 0.5, 0.009, 0.02, 0.5)
    test = claims.inner_test(0, "", values(1, 2, 3, 4, 5, 6), change)
    assert test.idle.tolist() == [True, False, False] * 2
    assert test.values.dropna().tolist() == [2, 3, 5, 6]
    judged = claims.judge([test])
    assert judged.verdict.tolist() == ["inconclusive"] * 2  # two numbers on each set
    none = claims.judge([claims.inner_test(0, "", values(1, 2, 3), values(0, 0, 0))])
    assert none.verdict.tolist() == ["inconclusive"] and none.idle[0] == 3
    half = claims.judge([claims.inner_test(0, "", values(1, 2, 3), values(0, 0, np.nan))])
    assert half.verdict.tolist() == ["not run"]


@pytest.mark.parametrize("words, worst", [
    (["supported", "not run", "inconclusive"], "not run"),
    (["supported", "not run", "contradicted"], "contradicted"),
    (["not run", "no effect of size"], "no effect of size"),
    (["no effect of size", "contradicted"], "contradicted"),
    (["supported", "inconclusive"], "inconclusive"),
    (["supported", "supported"], "supported"),
])  # fmt: skip
def test_a_claim_takes_the_least_favourable_verdict(words, worst):
    assert claims.overall(words) == worst
    assert set(claims.FROM_WORST) == set(WORDS) == {*VERDICTS, "not run"}


def test_a_test_is_described():
    tests = [
        a_test(1, 2, np.nan, -1, 0, 3, name="x"),
        a_test(*[np.nan] * 3, name="y"),
        claims.inner_test(0, "z", values(1, 2, 3), values(0, 0, 0)),
    ]
    table = claims.table_of_tests(claims.judge(tests), ["a", "b"]).set_index("test")
    assert table.a["x"] == "+1.5, n = 2: inconclusive; 1 not run"
    assert table.b["x"] == "+0.67 (-4.5 to +5.8), n = 3: inconclusive"
    assert (table.a["y"], table.b["y"]) == ("not run", "")
    assert table.a["z"] == "inconclusive; 3 idle"
    assert table.verdict.tolist() == ["inconclusive", "not run", "inconclusive"]


def test_chance_contradicts_rarely_and_supports_hardly_ever():
    one = claims.chance_verdicts([a_test(0, 0, 0)], repeats=2000)
    assert one["supported"] == pytest.approx(2.5, abs=1.2)  # five per cent, on both sides
    assert one["contradicted"] == pytest.approx(2.5, abs=1.2)
    many = [a_test(*[0] * 6, name=name) for name in "xyz"]
    assert claims.chance_verdicts(many)["supported"] == 0
    assert 0 < claims.chance_verdicts(many)["contradicted"] < 5
    few = pd.Series([0.0, 0.0], INDEX[:2])
    silent = claims.Test(0, "", few, few > 0, None)
    assert set(claims.chance_verdicts([silent]).values()) == {0}


EMPTY = ("joins", "corruption", "drift", "medians", "strips", "kernels", "spectra", "response")
EMPTY += ("gap", "hardness", "anchors", "transfer")
NOTHING = dict.fromkeys(EMPTY, ())


@pytest.mark.parametrize("measure", [
    claims.corruption_cost, claims.drift_ratio("all"), claims.least_share, claims.least_step,
    claims.kept_power, claims.higher("R", "F"), claims.gap_closed, claims.final_gap,
    claims.confusion, claims.above_fifth("positive"), claims.above_wrt("anchor"),
    claims.transfer_map,
    claims.map_change("FEM"),
])  # fmt: skip
def test_a_measure_of_nothing_is_not_a_number(measure):
    assert np.isnan(measure(NOTHING))


def test_the_extents_of_strips_are_in_the_order_of_their_taps():
    rows = [
        {"kernel": kernel, "seen": extent, "state": "trained"}
        for kernel, extent in (("11x1", 3), ("7x1", 1), ("1x7", 9), ("21x1", 3.5))
    ]
    assert claims.extents({"kernels": rows}, "height") == [(7, 1), (11, 3), (21, 3.5)]
    assert claims.extents({"kernels": rows}, "width") == [(7, 9)]
    assert claims.least_step({"kernels": rows}) == 0.5
    rows.append({"kernel": "1x11", "seen": 8, "state": "trained"})
    assert claims.least_step({"kernels": rows}) == -1


def test_a_cell_that_is_not_in_the_grid_is_refused():
    evidence = claims.Evidence("pocket", [], [])
    with pytest.raises(KeyError, match="no cell 'FME'"):
        evidence.select("modules", "FME")


def test_the_committed_table_is_what_records_and_probes_give(tmp_path):
    evidence = claims.Evidence("pocket", load_records(), load_probes())
    judged = claims.judge(claims.all_tests(evidence))
    table = claims.table_of_tests(judged, evidence.sets)
    table.to_csv(tmp_path / "claims.csv", index=False)
    made = (tmp_path / "claims.csv").read_bytes()
    assert made == (ROOT / "figures" / "smoke_claims.csv").read_bytes()


def record(job, mAP):
    """What findings read of the record of a run on rendered people."""
    entry = {"mean": {"mAP": mAP / 100}, "std": {}, "n": 1, "over": "splits"}
    about = {"id": job.id, "status": "smoke", "parameters": job.parameters}
    return about | {"data": {"rendered": True}, "scores": {"visible-to-infrared": entry}}


def cells_with_gains(group, label, other, gains):
    """Records of two cells on pocket-regdb, the first better by these points."""
    jobs = [j for j in grid.jobs("pocket", [group.study]) if j.dataset == "pocket-regdb"]
    jobs = [j for j in jobs if j.group == group]
    first, second = ([j for j in jobs if j.label == name] for name in (label, other))
    kept = [record(job, 50) for job, _ in zip(second, gains)]
    return kept + [record(job, 50 + gain) for job, gain in zip(first, gains)]


def sides(records, probes=()):
    """What the findings on rendered people and real data read."""
    presets = {"rendered people": "pocket", "real data": "paper"}
    return {w: claims.Evidence(p, records, probes) for w, p in presets.items()}


@pytest.mark.parametrize("gains, said", [
    ((1, 2, 3), "+2.0 on pocket-regdb (−0.5 to +4.5, 3 trunks: inconclusive);"),
    ((9.9, 10, 10.1), "to +10.2, 3 trunks: supported);"),
    ((-9.9, -10, -10.1), "to −9.8, 3 trunks: contradicted);"),
    ((0.02, 0.01, -0.02), ": no effect of size);"),
    ((4,), "+4.0 on pocket-regdb (n = 1, no interval);"),
    ((), "Rendered people: not run."),
])  # fmt: skip
def test_afen_against_caj_in_a_sentence(gains, said):
    kept = cells_with_gains(grid.ROWS, "afen", "caj", gains)
    sentence = claims.comparison_finding(sides(kept))
    assert said in sentence and sentence.endswith("Real data: not run.")
    assert not gains or "AFEN minus the base is not run; " in sentence


def test_afen_against_the_base_in_a_sentence():
    kept = cells_with_gains(grid.CORE, grid.FULL, "base", (1.5, 1.4, 1.6, 1.5, 1.7, 1.3))
    sentence = claims.comparison_finding(sides(kept))
    assert "AFEN minus CAJ is not run; AFEN minus the base is +1.5 on pocket-regdb" in sentence
    assert ", 6 trunks: supported); " in sentence


def test_real_data_are_repeated_by_splits_or_seeds():
    units = claims.Evidence("paper", [], []).units
    assert units == {"regdb": "splits", "sysu": "seeds"}


def test_without_records_all_is_not_run():
    table, pairs, claimed, modules, errata = claims.findings([], [])
    assert table == "0 of 8 rows of Table 1 are reproduced (8 not run)."
    assert pairs == "Rendered people: not run. Real data: not run."
    assert "6 not run on rendered people; 6 not run on real data" in claimed
    assert "not measured on rendered people; not measured on real data" in modules
    entries = tomllib.loads((ROOT / "nbs" / "errata.toml").read_text())["erratum"]
    assert f": {len(entries)} (" in errata


def test_modules_that_act_are_counted():
    cells = claims.Evidence("pocket", [], []).select(*claims.AFEN_CELL)
    changes = [0.02, 0.01, 0.009, 0.5, 0.0, 0.0][: len(cells)]
    probes = [
        {"run": run, "measures": NOTHING | {"joins": [
            {"kind": "MECS", "change": change}, {"kind": "FEM", "change": 0.0}
        ]}}
        for run, change in zip(cells.run, changes)
    ]  # fmt: skip
    n = len(probes)
    line = claims.modules_finding(sides([], probes))
    assert f"MECS in 3 of {n} and FEM in 0 of {n} on rendered people" in line


def made_up_tables(cell, number):
    """A probe's tables for a run of a cell; numbers that differ from run to run."""
    rng = np.random.default_rng(number)

    def near(value):
        return float(value * (1 + 0.01 * rng.standard_normal()))

    tables = {name: [] for name in EMPTY}
    severities = (0, 1, 5)
    for severity in severities:
        scores = {"mAP": near(0.5 - severity / 20), "rank1": near(0.6 - severity / 20)}
        tables["corruption"].append({"severity": severity, "setting": "s"} | scores)
    tables["gap"].append({"module": "", "where": "feature"} | gap_row(near))
    tables["transfer"].append({"dataset": "x", "setting": "s", "mAP": near(0.3), "rank1": 0.3})
    about = {"module": "net.m"}
    if cell not in ("base", "FEM"):
        tables["joins"].append(about | {"kind": "MECS", "change": near(0.5), "gain": 1.0})
        tables["medians"].append(about | {"zero": near(0.2)})
        tables["drift"] += [
            about | {"branch": branch, "kind": "blur", "severity": severity}
            | {"drift": near(0.1), "spread": near(0.2)}
            for branch in ("average", "maximum", "median", "all") for severity in severities[1:]
        ]  # fmt: skip
        for taps in (3, 5, 9):
            for strip in (f"1x{taps}", f"{taps}x1"):
                shares = {"variance": near(1 / 6), "energy": 1 / 6}
                tables["strips"].append(about | {"strip": strip} | shares)
                tables["kernels"] += [
                    about | {"kernel": strip, "state": state, "seen": near(taps / 4)}
                    for state in ("initial", "trained")
                ]
    if cell not in ("base", "MECS"):
        tables["joins"].append(about | {"kind": "FEM", "change": near(0.08), "gain": 1.0})
        tables["gap"] += [about | {"where": w} | gap_row(near) for w in ("input", "output")]
        for name, maps in (("spectra", ("input", "output")), ("response", "FQRS")):
            tables[name] += [
                about | {"map": which, "radius": radius, "power": near(1.0)}
                for which in maps for radius in BANDS
            ]  # fmt: skip
    for state in ("initial", "trained"):
        tables["anchors"].append({"state": state, "saturated": 0.0, "dead": near(0.1)})
        tables["hardness"] += [
            {"state": state, "loss": loss, "side": side, "fifth": fifth}
            | {"weight": 0.2, "gradient": near(fifth / 15)}
            for loss in ("wrt", "l_sq") for side in claims.SIDES for fifth in range(1, 6)
        ]  # fmt: skip
    return tables


def gap_row(near):
    """Made-up measures of the gap."""
    names = ("mmd", "centroids", "same_within", "same_across", "cross_within", "cross_across")
    return {name: near(0.5) for name in names}


def made_up(seeds):
    """Records and probes of the whole ablation on rendered people, for some seeds."""
    jobs = grid.runs_of(grid.jobs("pocket", ["ablation"]))
    jobs = [job for job in jobs.values() if job.seed in seeds]
    rng = np.random.default_rng(0)
    records = [record(job, 50 + rng.standard_normal()) for job in jobs]
    probes = [
        {"run": job.id, "measures": made_up_tables(job.label, number)}
        for number, job in enumerate(jobs)
    ]
    return records, probes


DRAWINGS = (
    claims.corruption_drawing, claims.drift_drawing, claims.strip_drawing,
    claims.frequency_drawing, claims.gap_drawing, claims.gradient_drawing,
    claims.whole_drawing,
)  # fmt: skip


@pytest.fixture(scope="module", params=[(4, 5), range(4, 10)], ids=["some", "all"])
def ablation(request):
    """Evidence from made-up runs, and how many trunks it has."""
    return claims.Evidence("pocket", *made_up(request.param)), len(request.param)


def test_made_up_runs_are_judged(ablation):
    evidence, n = ablation
    judged = claims.judge(claims.all_tests(evidence))
    assert (judged.n + judged.idle == n).all()
    words = set(claims.verdict_table(judged, evidence).verdict)
    if n < claims.LEAST:
        assert set(judged.verdict) == {"inconclusive"}
    else:
        assert judged.verdict[judged.test == "longer strips reach farther"].eq("supported").all()
        assert {"supported", "inconclusive"} <= set(judged.verdict)
    assert all(" on pocket-regdb" in word and word.endswith("(smoke)") for word in words)


@pytest.mark.parametrize("place", range(len(DRAWINGS)))
def test_made_up_runs_are_drawn(ablation, place):
    evidence, n = ablation
    drawing = DRAWINGS[place](evidence)
    assert len(drawing.data) and "nan" not in drawing.caption
    texts = [text.get_text() for axes in drawing.figure.axes for text in axes.texts]
    assert not [text for text in texts if "not run" in text]
    plt.close(drawing.figure)
    counted = [f"{n} trunks on {name}" for name in evidence.sets]
    assert drawing.stem == "whole" or ", ".join(counted) in drawing.caption


def test_claims_without_a_record_are_not_run(tmp_path):
    words = [Path(sys.executable).with_name("papermill"), "--no-progress-bar"]
    words += [ROOT / "nbs" / "claims.ipynb", tmp_path / "claims.ipynb"]
    words += ["-p", "kept", tmp_path / "nothing", "-p", "out", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    said = pd.read_csv(tmp_path / "smoke_claims.csv")
    assert set(said.claim) == {1, 2, 3, 4, 5, 6} and set(said.verdict) == {"not run"}
    text = (tmp_path / "smoke_claims_gap.svg").read_text()
    assert "not run" in text and "0 trunks on pocket-regdb" in text


def test_the_page_works_with_made_up_runs(ablation, monkeypatch, tmp_path):
    evidence, _ = ablation
    shown = []
    monkeypatch.setattr("afen.records.load_records", lambda folder: evidence.records)
    monkeypatch.setattr("afen.probes.load_probes", lambda folder: evidence.probes)
    monkeypatch.setattr("IPython.display.display", lambda *some: shown.extend(some))
    page: dict = {}
    for cell in json.loads((ROOT / "nbs" / "claims.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), page)
        if "parameters" in cell["metadata"].get("tags", []):
            page["out"] = str(tmp_path)
    plt.close("all")
    assert sum(isinstance(one, Figure) for one in shown) == len(DRAWINGS)
    said = pd.read_csv(tmp_path / "smoke_claims.csv")
    assert len(said) == said.test.nunique() and set(said.claim) == set(claims.CLAIMS)
    assert (tmp_path / "smoke_claims_gap.svg").exists()


def test_re_ranked_scores_of_a_record_enter_no_comparison():
    record = next(iter(load_records()))
    entry = next(iter(record["scores"].values()))
    higher = entry | {"mean": {name: value + 0.12 for name, value in entry["mean"].items()}}
    again = {f"{name}+reranked": higher for name in record["scores"]}
    more = record | {"scores": record["scores"] | again}
    assert claims.mean_ap([more]).equals(claims.mean_ap([record]))
