"""Tables: what may enter, what is counted, and that nothing committed is typed."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from afen import grid, tables
from afen.claims import findings
from afen.core import digest
from afen.probes import load_probes
from afen.records import OVER, fingerprint, load_records, new_record, run_id
from afen.records import score_entry, write_record
from afen.runs import DEFAULTS, make_plan
from afen.tables import (
    CELL,
    METRIC_TITLES,
    TOLERANCE,
    bootstrap_interval,
    compare,
    departures,
    markdown,
    outcome,
    published,
    read_block,
    real_records,
    save_table1,
    row_verdicts,
    table1_html,
    table1_markdown,
    table1_tex,
    verdict,
    wide_table,
    write_block,
)

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "regdb": ["visible-to-infrared", "infrared-to-visible"],
    "sysu": ["all-single", "indoor-single"],
}


WHICH = {"dataset": "regdb", "method": "afen", "preset": "paper", "split": 1, "seed": 0}
WHICH |= {"gallery": "random", "label_noise": 0.0}
PLANNED = [
    WHICH | {"dataset": dataset, "method": method}
    for dataset in SETTINGS
    for method in published()["method"].unique()
]


def table1(records):
    """The table whose rows are planned in the short form of these tests."""
    return tables.table1(records, PLANNED)


@pytest.fixture(scope="module")
def base():
    """The record of a run that has begun, to copy."""
    data = {"hash": "0" * 32, "protocol": "regdb", "rendered": False}
    return new_record(WHICH, data)


@pytest.fixture(scope="module")
def record(base):
    """A maker of sealed records whose scores are all one value, in per cent."""

    def make(value, status="full", galleries=1, std=None, **which):
        parameters = base["parameters"] | which
        protocol = parameters["dataset"].removeprefix("pocket-")
        summary = {name: {"mean": value / 100, "std": std} for name in METRIC_TITLES}
        each = [dict.fromkeys(METRIC_TITLES, value / 100)] * galleries
        entry = score_entry(summary, each, OVER[protocol], n_queries=9, n_gallery=9)
        scores = {} if status == "failed" else dict.fromkeys(SETTINGS[protocol], entry)
        named = {"id": run_id(parameters), "parameters_hash": digest(parameters)}
        made = base | named | {"parameters": parameters}
        made |= {"status": status, "reason": "a test", "scores": scores}
        return made | {"fingerprint": fingerprint(made)}

    return make


def cell(table, method="afen", setting="visible-to-infrared", metric="rank1"):
    """One row of table1."""
    names = dict(zip(CELL[::2] + CELL[3:], (method, setting, metric)))
    rows = table[(table[list(names)] == pd.Series(names)).all(axis=1)]
    assert len(rows) == 1
    return rows.iloc[0]


# ---------------------------------------------------------------- what is published


def test_the_published_table_is_whole():
    paper = published()
    assert len(paper) == 64 and not paper[CELL].duplicated().any()
    assert paper["value"].isna().sum() == 4 and paper["source"].str.len().min() > 0
    assert (paper["decimals"][paper["value"].notna()] == 2).all()
    kinds = {"publication", "readme", "issue", "secondary table", "from memory"}
    for name in ("originals", "remeasured", "corrupted", "stronger"):
        values = published(name)
        assert set(values["read"]) <= kinds and values["source"].str.len().min() > 8, name


def test_departures_respect_how_exact_a_source_is():
    changes = departures().set_index(CELL)
    assert set(changes.index.get_level_values("method")) == {"agw", "ddag", "dart"}
    exact = published("originals").set_index(CELL)
    assert exact.index.isin(published().set_index(CELL).index).all()
    cut = ("spot", "regdb", "visible-to-infrared", "rank1")  # known to one decimal
    assert exact.loc[cut, "decimals"] == 1 and cut not in changes.index
    for row in changes.itertuples():
        assert abs(row.value - row.original) >= 10.0**-row.decimals - 1e-9


# ---------------------------------------------------------------- what may enter


def test_a_record_edited_by_hand_is_refused_in_its_file(record, tmp_path):
    path = write_record(dict(record(50.0)), tmp_path)
    path = path.rename(tmp_path / f"{record(50.0)['id']}.json")
    assert len(load_records(tmp_path)) == 1
    path.write_text(path.read_text().replace("0.5", "0.9"))
    with pytest.raises(ValueError, match="was changed after it was written"):
        load_records(tmp_path)


def test_a_record_edited_by_hand_is_refused_in_memory(record):
    better = json.loads(json.dumps(record(50.0)))
    better["scores"]["visible-to-infrared"]["mean"]["rank1"] = 0.9
    with pytest.raises(ValueError, match="was changed after it was written"):
        table1([better])


def test_a_smoke_record_is_refused_however_it_is_named(record, base):
    smoke = record(99.0, "smoke", dataset="pocket-regdb")
    renamed = record(99.0, "full", dataset="pocket-regdb")
    rendered = record(99.0) | {"data": base["data"] | {"rendered": True}}
    rendered["fingerprint"] = fingerprint(rendered)
    for wrong in (smoke, renamed, rendered):
        with pytest.raises(ValueError, match="rendered data") as caught:
            table1([record(50.0), wrong])
        assert "\n" not in str(caught.value)
    assert real_records([smoke, renamed, rendered]) == []


# ---------------------------------------------------------------- what is counted


def test_without_records_nothing_is_said_of_us():
    table = table1([])
    assert (table["verdict"] == "not run").all() and table["mean"].isna().all()
    assert table["reason"].str.len().min() > 0
    shown = wide_table(table)
    assert set(shown.xs("ours", level=1).to_numpy().ravel()) == {"not run"}


def test_regdb_averages_seeds_within_splits_and_spreads_over_splits(record):
    grid = {(t, s): 60 + t + 2 * s for t in range(1, 11) for s in range(2)}
    runs = [record(float(v), split=t, seed=s) for (t, s), v in grid.items()]
    row = cell(table1(runs))
    splits = [(grid[t, 0] + grid[t, 1]) / 2 for t in range(1, 11)]
    assert np.isclose(row["mean"], sum(splits) / 10)
    assert np.isclose(row["std"], np.std(splits, ddof=1))
    assert (row["n"], row["over"], row["seeds"]) == (10, "splits", 2)
    paper = row["paper"]
    assert np.isclose(row["difference"], row["mean"] - paper)


def test_sysu_spreads_over_galleries_with_one_seed_and_over_seeds_with_more(record):
    def run(value, seed):
        return record(value, dataset="sysu", galleries=10, std=0.02, seed=seed)

    one = cell(table1([run(70.0, 0)]), setting="all-single")
    assert (one["n"], one["over"], one["seeds"]) == (10, "galleries", 1)
    assert np.isclose(one["std"], 2)
    three = table1([run(value, seed) for seed, value in enumerate((69.0, 70.0, 74.0))])
    three = cell(three, setting="all-single")
    assert (three["n"], three["over"], three["seeds"]) == (3, "seeds", 3)
    assert np.isclose(three["mean"], 71) and np.isclose(three["std"], np.sqrt(7))


def ten(record, value, **which):
    return [record(value, split=t, **which) for t in range(1, 11)]


def test_verdicts(record):
    paper = cell(table1([]))["paper"]
    cases = {
        "reproduced": ten(record, paper + 1),
        "not reproduced": ten(record, paper - TOLERANCE - 0.5),
        "inconclusive": ten(record, paper)[:9],
    }
    for expected, runs in cases.items():
        assert cell(table1(runs))["verdict"] == expected
    assert verdict(80.0, 80.0 + TOLERANCE, whole=True) == "reproduced"
    assert verdict(80.0, 80.01 + TOLERANCE, whole=True) == "not reproduced"


def test_a_cell_that_the_paper_does_not_report_has_no_verdict(record):
    table = table1(ten(record, 60.0, method="xmodal"))
    assert cell(table, "xmodal", "infrared-to-visible")["verdict"] == "no paper value"
    assert "- " not in table1_markdown(table).split("\n")[0]


def test_failed_runs_are_counted(record):
    failed = [record(0.0, "failed", split=t) for t in (9, 10)]
    alone = cell(table1(failed))
    assert (alone["status"], alone["verdict"]) == ("failed (2 of 2)", "inconclusive")
    among = cell(table1(ten(record, 86.0)[:8] + failed))
    assert among["status"] == "full; failed (2 of 10)"
    assert among["verdict"] == "inconclusive"
    assert "failed (2 of 10)" in table1_markdown(table1(ten(record, 86.0)[:8] + failed))


def test_partial_runs_never_give_a_verdict_nor_mix_with_whole_ones(record):
    partial = ten(record, 86.3, status="partial", label_noise=0.2)
    row = cell(table1(partial))
    assert (row["status"], row["verdict"]) == ("partial", "inconclusive")
    both = cell(table1(ten(record, 70.0) + partial))
    assert (both["status"], both["mean"]) == ("full", 70)
    other = [record(50.0, "partial", label_noise=x) for x in (0.2, 0.5)]
    mixed = cell(table1(other))
    assert np.isnan(mixed["mean"]) and "2 recipes" in mixed["reason"]


def test_runs_of_another_recipe_change_nothing(record):
    """Ablations and noise runs of a row's method, finished or failed."""
    own = ten(record, 86.0)
    wrong = record(0.0, "failed", split=3, label_noise=0.5)
    other = [wrong, record(20.0, "partial", label_noise=0.2), record(20.0, precision="float32")]
    pd.testing.assert_frame_equal(table1(own), table1([*other, *own]))
    (alone,) = {cell(table1([wrong]), metric=m)["reason"] for m in ("rank1", "mAP")}
    assert alone == "no run of the row's own recipe"


def test_a_row_is_planned_by_the_grid(base):
    """By the true grid: a diverged run with `-p mecs paper_bare` is no run of AFEN's row."""
    row_parameters = [job.parameters for job in grid.jobs("paper", ["rows"])]

    def run(**given):
        parameters = make_plan(DEFAULTS | {"dataset": "regdb"} | given).parameters
        return {"parameters": parameters, "reason": ""}

    own = [run(split=trial, seed=3) for trial in (1, 10)]
    bare = run(mecs="paper_bare") | {"status": "failed"}
    assert tables.row_records([bare, *own], row_parameters) == own
    assert tables.row_records([bare], row_parameters) == []
    changes = {"epochs": 60}, {"label_noise": 0.2}, {"flip": False}, {"stable": False}
    for changed in (*changes, {"precision": "bfloat16"}):
        finished = run(**changed) | {"status": "full"}
        assert tables.row_records([finished, *own], row_parameters) == own
        assert tables.row_records([finished], row_parameters)[0]["status"] == "partial"


def test_the_official_gallery_is_another_protocol(record):
    run = record(71.7, dataset="sysu", galleries=10, std=0.02, gallery="official")
    assert cell(table1([run]), setting="all-single")["verdict"] == "inconclusive"


def everything(record):
    """Records that reproduce each cell's paper value, as far as one value can."""
    paper = published().set_index(CELL)["value"]
    runs = []
    for method in published()["method"].unique():
        runs += ten(record, paper[method, "regdb", "visible-to-infrared", "rank1"], method=method)
    return runs


def test_a_row_needs_all_of_its_cells(record):
    table = table1(everything(record))
    row = cell(table, "caj")
    assert row["verdict"] == "reproduced"
    assert (row_verdicts(table) != "reproduced").all()
    assert outcome(table.assign(verdict="reproduced")).startswith("[Re]")
    worse = table.assign(verdict="reproduced")
    worse.loc[0, "verdict"] = "not reproduced"
    assert outcome(worse).startswith("[not Re]")


def test_one_contradicted_cell_contradicts_its_row(record):
    """CAJ alone was run, on RegDB alone, and is 25 points off."""
    paper = cell(table1([]), "caj")["paper"]
    table = table1(ten(record, paper - 25, method="caj"))
    rows = row_verdicts(table)
    assert rows["CAJ"] == "not reproduced" and (rows.drop("CAJ") == "not run").all()
    assert outcome(table) == "[not Re] contradicted: 1 of 8 rows"
    assert outcome(table1(ten(record, paper, method="caj")[:9])).startswith("inconclusive")
    assert outcome(table1([])) == "not run"


# ---------------------------------------------------------------- forms


class Page(HTMLParser):
    """What a page holds: tags, links, and the cells of its tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href")]

    def handle_data(self, data):
        self.text.append(data)


def test_every_form_has_every_published_number_and_every_rule(record):
    table = table1(everything(record))
    page = Page(table1_html(table))
    plain = {
        "md": table1_markdown(table),
        "tex": table1_tex(table),
        "html": "\n".join(page.text),
    }
    for form, text in plain.items():
        for value in table["paper"].dropna():
            assert f"{value:.2f}" in text, form
        for word in ("not run", "last epoch", "flip", "ten galleries", str(TOLERANCE)):
            assert word in text, (form, word)
    assert page.tags.count("button") == page.tags.count("th") - 8 - 64
    assert not page.links and "aria-sort" in table1_html(table)


def test_latex_rows_have_ten_cells_and_escape(record):
    code = table1_tex(table1(ten(record, 86.0)))
    rows = [line for line in code.splitlines() if line.endswith(r"\\")]
    assert rows and all(len(re.findall(r"(?<!\\)&", row)) == 9 for row in rows)
    assert code.count("{") == code.count("}") and "±" not in code and "%\n" in code
    assert not re.search(r"(?<!\\)[_#]", code)


def test_saving_repeats_byte_for_byte(record, tmp_path):
    table = table1(ten(record, 86.0))
    back = pd.read_csv(save_table1(table, tmp_path)[0], keep_default_na=False, na_values=[""])
    np.testing.assert_allclose(back["mean"], table["mean"].astype(float), atol=1e-4)
    first, second = (save_table1(table, tmp_path / name) for name in "ab")
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()


# ---------------------------------------------------------------- pairs and seeds


def test_comparison_by_hand(record):
    here = "visible-to-infrared", "rank1"
    left = [record(v, seed=s) for s, v in enumerate((50.0, 60.0, 90.0))]
    right = [record(v, seed=s, method="caj") for s, v in ((1, 61.0), (0, 53.0))]
    pair = compare(left, right, here[1], here[0])
    assert pair.pairs["difference"].round(9).tolist() == [3, 1]
    assert np.isclose(pair.mean, 2) and pair.interval is None
    assert str(pair) == "+2.00 points, n = 2 (+3.00, +1.00)"
    one = compare(left[0], right[1], here[1], here[0])
    assert np.isclose(one.mean, 3) and one.interval is None


def test_an_interval_needs_four_pairs(record):
    def side(method, n):
        return [record(50.0 + s * s, seed=s, method=method) for s in range(n)]

    for n in range(1, 6):
        pair = compare(side("caj", n), side("afen", n), "mAP", "visible-to-infrared")
        assert (pair.interval is None) == (n <= 3)


def test_bootstrap_against_a_loop():
    d, rng = [0.3, -1.0, 2.5, 0.9, 4.0], np.random.default_rng(0)
    means = [np.mean([d[i] for i in rng.integers(5, size=5)]) for _ in range(tables.DRAWS)]
    expected = np.quantile(means, [0.025, 0.975])
    np.testing.assert_allclose(bootstrap_interval(d), expected)


def test_an_interval_repeats():
    d = np.sqrt(range(9))
    assert bootstrap_interval(d) == bootstrap_interval(d)
    assert bootstrap_interval([2, 2, 2, 2]) == (2, 2)


def test_comparisons_that_mean_nothing(record):
    one, metric = record(50.0), ("rank1", "visible-to-infrared")
    wrong = {
        "share no split and seed": record(50.0, seed=1),
        "different data sets": record(50.0, dataset="sysu"),
        "more than split and seed": [one, record(50.0, label_noise=0.2, seed=1)],
    }
    for words, other in wrong.items():
        with pytest.raises(ValueError, match=words):
            compare(one, other, *metric)


def test_differences_in_words():
    assert tables.mean_and_range([1.25, -2.75]) == "-0.8 (-2.8 to +1.2, n = 2)"
    assert tables.mean_and_range([np.nan]) == tables.mean_and_range([]) == ""


# ---------------------------------------------------------------- nothing is typed


def test_a_block_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    block = "<!-- generated: a -->\n{}\n<!-- end: a -->"
    page.write_text("before\n" + block.format("old") + "\nafter\n")
    write_block(page, "a", "new\n\nlines\n")
    assert page.read_text() == "before\n" + block.format("new\n\nlines") + "\nafter\n"
    assert read_block(page, "a") == "new\n\nlines"
    for broken in ("", block.format("") * 2, "<!-- end: a --><!-- generated: a -->"):
        page.write_text(broken)
        with pytest.raises(ValueError, match="once each"):
            write_block(page, "a", "new")


ALLOWED = {  # what may hold such a number, and why
    "the paper, quoted": r"^> \*\*Paper\*\*[^\n]*(?:\n>[^\n]*)*",
    "code, or what to type": r"^```[\s\S]*?^```|`[^`\n]*`",
    "a formula with more in it than a number": r"\$[^$\n]*[\\=A-Za-z][^$\n]*\$",
    "the level of an interval": r"95\s%\s+intervals?",
    "a version, a size": r"Python \d\.\d+|License \d\.\d|\d+(?:\.\d+)? GB",
}
NUMBER = r"\d+\.\d+"
SCORE = rf"{NUMBER}|\d+\s*(?:%|per\s+cent|percent|points?\b)"
SCORE += r"|(?:Rank-\d+|mAP|mINP)\b[^\d\n]{0,20}\d\d"


def typed_scores(text):
    """Numbers in prose or tables that look like scores."""
    for pattern in ALLOWED.values():
        text = re.sub(pattern, " ", text, flags=re.M)
    return re.findall(SCORE, text)


def differing(made, kept, pattern):
    """Names under `pattern` that two folders do not both hold with equal content."""
    names = {path.name for folder in (made, kept) for path in folder.glob(pattern)}
    return sorted(name for name in names if not same(made / name, kept / name))


def same(one, two):
    """Equal bytes; for pictures, nearly equal pixels."""
    if not (one.exists() and two.exists()):
        return False
    if one.suffix != ".png":
        return one.read_bytes() == two.read_bytes()
    first, second = (Image.open(path).convert("RGB") for path in (one, two))
    if first.size != second.size:
        return False
    return np.abs(np.asarray(first, int) - np.asarray(second, int)).mean() < 1


def test_a_typed_digit_is_found(record, tmp_path):
    made, kept = tmp_path / "made", tmp_path / "kept"
    for folder in (made, kept):
        save_table1(table1(ten(record, 86.0)), folder)
    assert differing(made, kept, "table1.*") == []
    for path in kept.iterdir():
        text = path.read_text()
        path.write_text(text.replace("86.00", "87.00"))
        assert differing(made, kept, "table1.*") == [path.name]
        path.write_text(text)
    (kept / "table1.md").unlink()
    assert differing(made, kept, "table1.*") == ["table1.md"]


TYPED = {
    "| a | 71.74 |": ["71.74"],
    "reaches 72 % there": ["72 %"],
    "72 per\ncent": ["72 per\ncent"],
    "ahead by 3 points": ["3 points"],
    "a Rank-1 of 64": ["Rank-1 of 64"],
    "mAP: 70": ["mAP: 70"],
    "that is $72.5$ there": ["72.5"],
    r"less than $1 - \sqrt{0.9}$": [],
    "> **Ours.** It gains 1.5.": ["1.5"],
    "three seeds of 8 methods, 64 by 32 pixels\n| b | 3 |": [],
    '> **Paper** (3.1). "gains of 1.86 % in\n> Rank-1 and 2.07 %"\n': [],
    "```\n-p lr 0.1\n```\nand `0.2`": [],
}


@pytest.mark.parametrize("text", TYPED)
def test_a_typed_score_is_found(text):
    assert typed_scores(text) == TYPED[text]


RESULTS = ["index", "table1", "pocket"]
PAGES = [*RESULTS, "ablation", "claims", "decisions"]


@pytest.mark.parametrize("name", PAGES)
def test_results_pages_type_no_score(name):
    book = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4)
    cells = [cell.source for cell in book.cells if cell.cell_type == "markdown"]
    assert typed_scores("\n".join(cells)) == []


def test_readme_types_no_score():
    readme = ROOT / "README.md"
    assert typed_scores(readme.read_text().replace(read_block(readme, "state"), "")) == []


def test_readme_says_what_the_records_give():
    block = read_block(ROOT / "README.md", "state")
    row_parameters = [job.parameters for job in grid.jobs("paper", ["rows"])]
    kept = load_records()
    lines = findings(kept, load_probes())
    assert len(lines) == 5
    assert block == tables.state_block(kept, row_parameters, lines).strip()


def test_the_state_counts_real_and_rendered_runs_apart(record):
    smoke = record(90.0, "smoke", dataset="pocket-regdb")
    failed = record(0.0, "failed", method="pmt")
    runs = [*ten(record, 60.0, method="caj"), failed, smoke]
    block = tables.state_block(runs, PLANNED, ["One.", "Two."])
    assert block.startswith("* One.\n* Two.\n\nOutcome of Table 1: [not Re]")
    assert "| finished runs | 10 | 1 |\n| failed runs | 1 | 0 |" in block
    assert tables.state_block([], PLANNED).startswith("Outcome of Table 1: not run: no access")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The results pages run anew by papermill, from the project's root."""
    folder = tmp_path_factory.mktemp("made")
    papermill = Path(sys.executable).with_name("papermill")
    for name in RESULTS:
        page = [ROOT / "nbs" / f"{name}.ipynb", folder / f"{name}.ipynb"]
        where = ["-p", "out", folder / "figures"]
        if name == "index":
            readme = folder / "README.md"
            readme.write_text((ROOT / "README.md").read_text())
            write_block(readme, "state", "deleted")
            where = ["-p", "readme", readme]
        words = [papermill, "--no-progress-bar", *page, *where]
        done = subprocess.run(
            list(map(str, words)), capture_output=True, text=True, cwd=ROOT,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_the_index_writes_the_block_of_the_readme(made):
    assert (made / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()


def said(path):
    """The Markdown that a notebook's cells have put out."""
    book = nbformat.read(path, as_version=4)
    outputs = [o for cell in book.cells for o in cell.get("outputs", [])]
    data = [output.get("data", {}).get("text/markdown") for output in outputs]
    return ["".join(text) for text in data if text]


@pytest.mark.parametrize("name", RESULTS)
def test_a_committed_page_says_what_the_records_give(made, name):
    committed = said(ROOT / "nbs" / f"{name}.ipynb")
    assert committed and committed == said(made / f"{name}.ipynb")


DRAWN = ["table1.*", "smoke_pocket*", "smoke_paper_size.csv"]  # by RESULTS, compared here
ELSEWHERE = {  # where the others are compared
    "smoke_ablation*": "tests/test_workflow.py makes them again",
    "smoke_claims*": "tests/test_workflow.py makes them again",
    "afen_network.*": "tests/test_afen.py measures its shapes",
}


def test_every_figure_is_compared():
    patterns = [*DRAWN, *ELSEWHERE]
    for path in (ROOT / "figures").iterdir():
        assert sum(path.match(pattern) for pattern in patterns) == 1, path.name
    for pattern in patterns:
        assert list((ROOT / "figures").glob(pattern)), pattern


@pytest.mark.parametrize("pattern", DRAWN)
def test_committed_figures_are_what_the_records_give(made, pattern):
    assert differing(made / "figures", ROOT / "figures", pattern) == []


def test_an_unknown_parameter_stops_the_page(tmp_path):
    papermill = str(Path(sys.executable).with_name("papermill"))
    page, output = str(ROOT / "nbs" / "table1.ipynb"), str(tmp_path / "out.ipynb")
    words = [papermill, "--no-progress-bar", page, output, "-p", "recods", "elsewhere"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0 and "did you mean 'records'" in done.stderr


def test_markdown_escapes_bars():
    table = markdown(pd.DataFrame({"a|b": [1.5, None]}))
    assert table.splitlines() == [r"| a\|b |", "| --- |", "| 1.5 |", "|  |"]
