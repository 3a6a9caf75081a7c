"""The claims: the rule against cases, measures by hand, findings of made-up runs."""

import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from afen import claims, grid
from afen.probes import load_probes
from afen.records import load_records

ROOT = Path(__file__).resolve().parent.parent
INDEX = pd.MultiIndex.from_product([["a", "b"], [1], [0, 1, 2]], names=claims.KEYS)
BARS = pd.Series({"a": 1.0, "b": 5.0})


def values(*numbers):
    """Numbers on data set a, and on b if there are six."""
    return pd.Series(numbers, INDEX[: len(numbers)], dtype=float)


@pytest.mark.parametrize("numbers, word", [
    ((1, 2, 3, 1, 2, 3), "supported"),
    ((-1, 0, -3, -1, -2, -3), "not supported"),
    ((1, 2, 3, 1, 2, -3), "inconclusive"),
    ((1, 2, 3, 1, 2, np.nan), "inconclusive"),
    ((1, 2, 3), "supported"),
    ((np.nan,) * 6, "not run"),
])  # fmt: skip
def test_the_rule_of_signs(numbers, word):
    assert claims.judge_numbers(values(*numbers)) == word


@pytest.mark.parametrize("sign, word", [(1, "supported"), (-1, "not supported")])
def test_the_rule_of_size(sign, word):
    assert claims.judge_numbers(sign * values(1, 2, 3, 4, 5, 6), bar=BARS) == word
    short = sign * values(1, 2, 3, 3, 5, 6)
    assert claims.judge_numbers(short, bar=BARS) == "inconclusive"
    unknown = claims.judge_numbers(sign * values(9, 9, 9), bar=BARS * np.nan)
    assert unknown == "inconclusive"


def test_an_idle_test_is_inconclusive():
    none = values(*[np.nan] * 6)
    assert claims.judge_numbers(none, none.isna()) == "inconclusive"
    change = values(0.009, 0.02, 0.5, 0.009, 0.02, 0.5)
    test = claims.inner_test(0, "", values(1, 2, 3, 4, 5, 6), change)
    assert test.idle.tolist() == [True, False, False] * 2
    assert test.values.dropna().tolist() == [2, 3, 5, 6]
    assert test.verdict == "inconclusive"  # two numbers on each set


def test_the_bar_is_the_deviation_over_seeds():
    assert claims.seed_deviation(values(1, 2, 3, 0, 5, 10)).to_dict() == {"a": 1, "b": 5}
    assert claims.seed_deviation(values(1, 2, np.nan)).isna().all()


@pytest.mark.parametrize("words, worst", [
    (["supported", "not run", "inconclusive"], "not run"),
    (["supported", "not run", "not supported"], "not supported"),
    (["supported", "inconclusive"], "inconclusive"),
    (["supported", "supported"], "supported"),
])  # fmt: skip
def test_a_claim_takes_the_least_favourable_verdict(words, worst):
    assert claims.overall(words) == worst


def test_a_test_is_described():
    some, none = values(1, 2, np.nan, -1, 0, 3), values(*[0] * 6) > 0

    def said(test_values, idle, bar, dataset):
        return claims.describe(claims.Test(0, "", test_values, idle, bar), dataset)

    assert said(some, none, None, "a") == "2 of 2, mean +1.5, 1 not run"
    assert said(some, none, None, "b") == "1 of 3, mean +0.67"
    assert said(some, some.isna(), None, "a") == "2 of 2, mean +1.5, 1 idle"
    assert said(some[:3], none[:3], None, "b") == ""
    assert said(some, none, BARS, "b") == "1 of 3, mean +0.67, bar 5"


EMPTY = ("joins", "noise", "drift", "medians", "strips", "kernels", "spectra", "response")
EMPTY += ("gap", "hardness", "anchors", "transfer")
NOTHING = dict.fromkeys(EMPTY, ())


@pytest.mark.parametrize("measure", [
    claims.noise_cost, claims.drift_ratio("all"), claims.least_share, claims.least_step,
    claims.kept_power, claims.separation, claims.gap_closed, claims.final_gap,
    claims.confusion, claims.above_fifth, claims.above_wrt, claims.transfer_map,
    claims.map_change("FEM"),
])  # fmt: skip
def test_a_measure_of_nothing_is_not_a_number(measure):
    assert np.isnan(measure(NOTHING))


def test_the_extents_of_upright_strips_are_in_the_order_of_their_taps():
    rows = [
        {"kernel": kernel, "seen": extent, "state": "trained"}
        for kernel, extent in (("11x1", 3), ("7x1", 1), ("1x7", 9), ("21x1", 3.5))
    ]
    assert claims.upright_extents({"kernels": rows}) == [(7, 1), (11, 3), (21, 3.5)]
    assert claims.least_step({"kernels": rows}) == 0.5


def test_a_cell_that_is_not_in_the_grid_is_refused():
    evidence = claims.Evidence("pocket", [], [])
    with pytest.raises(KeyError, match="no cell 'FME'"):
        evidence.select("modules", "FME")


def test_the_committed_table_is_what_records_and_probes_give(tmp_path):
    evidence = claims.Evidence("pocket", load_records(), load_probes())
    table = claims.table_of_tests(claims.all_tests(evidence), evidence.sets)
    table.to_csv(tmp_path / "claims.csv", index=False)
    made = (tmp_path / "claims.csv").read_bytes()
    assert made == (ROOT / "figures" / "smoke_claims.csv").read_bytes()


def record(job, mAP):
    """What findings read of the record of a run on rendered people."""
    entry = {"mean": {"mAP": mAP / 100}, "std": {}, "n": 1, "over": "splits"}
    about = {"id": job.id, "status": "smoke", "parameters": job.parameters}
    return about | {"data": {"rendered": True}, "scores": {"visible-to-infrared": entry}}


def rows_with_gains(*gains):
    """Records of CAJ and AFEN on pocket-regdb, AFEN better by these points."""
    jobs = [j for j in grid.jobs("pocket", ["rows"]) if j.dataset == "pocket-regdb"]
    caj, afen = ([j for j in jobs if j.label == name] for name in ("caj", "afen"))
    kept = [record(job, 50) for job, _ in zip(caj, gains)]
    return kept + [record(job, 50 + gain) for job, gain in zip(afen, gains)]


@pytest.mark.parametrize("gains, said", [
    ((1, 2, 3), "+2.0 on pocket-regdb (95 % interval over 3 seeds: −0.5 to +4.5); "
                "no difference is shown."),
    ((9.9, 10, 10.1), "to +10.2); AFEN is better."),
    ((-9.9, -10, -10.1), "to −9.8); AFEN is worse."),
    ((4,), "+4.0 on pocket-regdb (1 pair of runs); no difference is shown."),
    ((), "Rendered people: not run."),
])  # fmt: skip
def test_afen_against_caj_in_a_sentence(gains, said):
    sentence = claims.comparison_finding(rows_with_gains(*gains))
    assert said in sentence and sentence.endswith("Real data: not run.")


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
    line = claims.findings([], probes)[3]
    assert f"MECS in 3 of {n} and FEM in 0 of {n} on rendered people" in line


def test_claims_without_a_record_are_not_run(tmp_path):
    words = [Path(sys.executable).with_name("papermill"), "--no-progress-bar"]
    words += [ROOT / "nbs" / "claims.ipynb", tmp_path / "claims.ipynb"]
    words += ["-p", "kept", tmp_path / "nothing", "-p", "out", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    said = pd.read_csv(tmp_path / "smoke_claims.csv")
    assert set(said.claim) == {1, 2, 3, 4, 5, 6} and set(said.verdict) == {"not run"}
    text = (tmp_path / "smoke_claims_gap.svg").read_text()
    assert "not run" in text and "0 seeds on pocket-regdb" in text
