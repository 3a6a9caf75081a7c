"""The rule of verdicts: arithmetic beside scipy's, chance as it is promised, refusals."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from afen import verdicts
from afen.core import keyed_rng
from afen.verdicts import deviations, effect, holm, power, trunk_effects, verdict_table


def draws(*keys, size, mean=0.0, std=1.0):
    return mean + std * keyed_rng("test_verdicts", *keys).standard_normal(size)


@pytest.mark.parametrize("n", [2, 3, 6, 12])
def test_an_effect_is_scipys_t_test(n):
    values = draws("effect", n, size=n, mean=0.7)
    one, other = effect(values), stats.ttest_1samp(values, 0.0)
    low, high = other.confidence_interval(0.95)
    assert np.allclose([one.mean, one.low, one.high], [values.mean(), low, high])
    assert np.isclose(one.p_zero, other.pvalue)
    sides = (stats.ttest_1samp(values, 1.0, alternative="less").pvalue,
             stats.ttest_1samp(values, -1.0, alternative="greater").pvalue)
    assert np.isclose(one.p_size, min(1.0, 2 * max(sides)))


@pytest.mark.parametrize("mean", [-1.4, -0.5, 0.0, 0.3, 0.8, 2.0])
@pytest.mark.parametrize("std", [0.1, 0.6, 2.0])
def test_the_tests_agree_with_the_interval(mean, std):
    one = effect(draws("interval", mean, std, size=6, mean=mean, std=std))
    assert (one.p_zero < 0.05) == (one.low > 0 or one.high < 0)
    assert (one.p_size < 0.05) == (-1 < one.low and one.high < 1)


def test_holm_is_the_step_down_of_the_book():
    for m in (1, 2, 5, 17):
        p = keyed_rng("holm", m).random(m) ** 4
        adjusted, rejected, order = holm(p), set(), p.argsort()
        assert (adjusted >= p).all() and (np.diff(adjusted[order]) >= 0).all()
        for k, i in enumerate(order):  # stop at the first that is not small enough
            if p[i] > 0.05 / (m - k):
                break
            rejected.add(i)
        assert rejected == set(np.flatnonzero(adjusted <= 0.05)), m
    assert holm(np.array([])).size == 0 and holm(np.array([0.9, 0.8])).max() == 1


EFFECTS = {  # mean and deviation of six trunks -> verdict, alone
    (1.5, 0.3): "supported", (0.4, 0.1): "supported", (-1.5, 0.3): "contradicted",
    (0.05, 0.2): "no effect of size", (0.6, 2.0): "inconclusive",
}  # fmt: skip
SPREAD = np.array([-1.0, -0.5, -0.2, 0.2, 0.5, 1.0])


@pytest.mark.parametrize("about, verdict", EFFECTS.items(), ids=str)
def test_a_verdict_follows_from_where_the_interval_lies(about, verdict):
    values = about[0] + about[1] * SPREAD
    table = verdict_table(pd.DataFrame({"one": values}))
    assert table.verdict.item() == verdict and verdict in verdicts.VERDICTS
    mirrored = verdict_table(pd.DataFrame({"one": -values})).verdict.item()
    swap = {"supported": "contradicted", "contradicted": "supported"}
    assert mirrored == swap.get(verdict, verdict)


def test_what_else_is_compared_can_take_a_verdict_away():
    small = 0.4 + 0.3 * SPREAD
    assert verdict_table(pd.DataFrame({"one": small})).verdict["one"] == "supported"
    noise = {f"noise {k}": draws("family", k, size=6, std=3.0) for k in range(40)}
    assert verdict_table(pd.DataFrame({"one": small} | noise)).verdict["one"] != "supported"


def test_a_familys_verdicts_are_those_of_its_table():
    table = {f"about {a}": a[0] + a[1] * SPREAD for a in EFFECTS}
    effects = [effect(values) for values in table.values()]
    verdict = verdicts.decide_all(effects)
    assert verdict == verdict_table(pd.DataFrame(table)).verdict.tolist()
    assert verdicts.decide_all(effects[::-1]) == verdict[::-1]  # no order matters
    small = effect(0.4 + 0.3 * SPREAD)
    assert verdicts.decide_all([small]) == ["supported"]
    crowd = [effect(draws("crowd", k, size=6, std=3.0)) for k in range(40)]
    assert verdicts.decide_all([small, *crowd])[0] != "supported"


def runs_of(cells, trunks=3, seeds=2):
    return pd.DataFrame([
        {"cell": cell, "trunk": t, "seed": s, "value": 10 * t + s + more}
        for cell, more in cells.items() for t in range(trunks) for s in range(seeds)
    ])  # fmt: skip


def test_runs_are_paired_by_trunk_and_seed_in_any_order():
    runs = runs_of({"base": 0.0, "MECS": 1.5, "FEM": -0.5})
    effects = trunk_effects(runs.sample(frac=1, random_state=0), "base")
    assert effects.shape == (3, 2)
    assert (effects["MECS"] == 1.5).all() and (effects["FEM"] == -0.5).all()


def test_a_missing_run_a_double_one_and_no_reference_are_refused():
    runs = runs_of({"base": 0.0, "MECS": 1.5})
    for wrong, sentence in (
        (runs[1:], "Cell 'base' has no run of trunk 0, seed 0"),
        (runs[:-1], "Cell 'MECS' has no run of trunk 2, seed 1"),
        (pd.concat([runs, runs[:1]]), "two runs of one trunk and seed"),
        (runs[runs.cell != "base"], "no runs of the reference 'base'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            trunk_effects(wrong, "base")


def test_deviations_are_those_that_were_drawn():
    rng = keyed_rng("test_verdicts", "deviations")
    trunks = np.repeat(np.arange(4000), 2)
    values = 1.2 * rng.standard_normal(4000)[trunks] + 0.4 * rng.standard_normal(8000)
    between, within = deviations(pd.DataFrame({"trunk": trunks, "value": values}))
    assert abs(between - 1.2) < 0.05 and abs(within - 0.4) < 0.02
    same = pd.DataFrame({"trunk": [0, 0, 1, 1], "value": [0.0, 2.0, 0.5, 1.5]})
    assert deviations(same)[0] == 0  # runs explain all


@pytest.mark.parametrize("trunks, runs, between, within, family",
                         [(6, 2, 0.5, 0.5, 1), (12, 1, 1.0, 0.5, 1), (6, 4, 0.3, 0.6, 10)])
def test_power_is_how_often_it_is_found(trunks, runs, between, within, family):
    rng = keyed_rng("test_verdicts", "power", trunks)
    drawn = 1.0 + between * rng.standard_normal((4000, trunks))
    drawn += within / np.sqrt(runs) * rng.standard_normal((4000, trunks))
    found = np.mean(stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05 / family)
    assert abs(found - power(trunks, runs, between, within, family=family)) < 0.03


def test_simulated_comparisons_have_their_deviations_and_share_their_base():
    rng = keyed_rng("test_verdicts", "simulated")
    effects = verdicts.simulated_effects(rng, 2, 20000, 2, 0.4, 0.8, true=1.0)
    assert np.allclose(effects.mean(), 1.0, atol=0.02)
    assert np.allclose(effects.var(), 0.4**2 + 0.8**2 / 2, rtol=0.04)
    assert np.isclose(effects.cov().loc[0, 1], 0.8**2 / 4, rtol=0.1)


def test_more_trunks_help_and_the_fewest_that_do_are_named():
    how = dict(runs=2, between=0.8, within=0.5)
    n = verdicts.trunks_needed(**how)
    assert power(n, **how) >= 0.8 > power(n - 1, **how)
    assert np.isclose(power(6, true=0.0, **how), 0.025)  # no effect: what the test may err upwards


@pytest.mark.parametrize("n", range(2, 40))
def test_power_is_a_number_however_certain_the_finding(n):
    assert 0 < power(n, 2, 0.25, 0.5, family=20) <= 1


def test_a_family_errs_as_seldom_as_promised():
    """Both kinds of mistake, in a family whose comparisons share their base."""
    shares = verdicts.false_verdicts(keyed_rng("promise"), 8, 6, 2, 0.3, 0.6, repeats=250)
    assert shares["any difference"] < 0.09 and shares["any denial"] < 0.09
    assert shares["unadjusted"] > 0.15 and shares["differences"] >= shares["any difference"]


def test_too_little_is_refused():
    for values in ([], [1.0], [1.0, np.nan, 2.0]):
        with pytest.raises(ValueError, match="two or more trunks, all with scores"):
            effect(np.array(values))
    for trunks in ([0, 0, 0], [0, 1], [0, 0, 1]):
        table = pd.DataFrame({"trunk": trunks, "value": np.arange(len(trunks))})
        with pytest.raises(ValueError, match="equally many runs"):
            deviations(table)
