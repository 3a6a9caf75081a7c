"""The logs of decisions and errata: complete, cited rightly, linked, and in step."""

import ast
import json
import re
import tomllib
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from test_modules import EVERY_OPTION

from afen.records import run_id
from afen.tables import published

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
LOGS = {"decisions": "decision", "errata": "erratum"}
ID = r"[MFLPTBE]\d{1,2}"


def entries(name: str) -> list[dict]:
    return tomllib.loads((NBS / f"{name}.toml").read_text())[LOGS[name]]


def cells(path: Path, kind: str | None = None) -> list[dict]:
    book = json.loads(path.read_text())
    return [c for c in book["cells"] if kind in (None, c["cell_type"])]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def headings(path: Path) -> set[str]:
    text = "\n".join(source(c) for c in cells(path, "markdown"))
    return set(re.findall(r"^#+ (.+?)\s*$", text, re.M))


def cited(text: str) -> set[str]:
    """Ids in brackets, "(M11, M12)", behind the word, "decision L5", or as "F1 to F12"."""
    found = set()
    for a, b, c in re.findall(r"\b([MFLPTBE])(\d{1,2}) to (?:\1)(\d{1,2})\b", text):
        found |= {f"{a}{n}" for n in range(int(b), int(c) + 1)}
    for group in re.findall(rf"\(({ID}(?:(?:, | and ){ID})*)\)", text):
        found |= set(re.findall(ID, group))
    return found | set(re.findall(rf"decision ({ID})\b", text))


KNOWN = {entry["id"] for name in LOGS for entry in entries(name)}


def test_ids_run_from_one_without_a_gap():
    assert {i[0] for i in KNOWN} == set("MFLPTBE")
    for letter, least in {"M": 13, "F": 13, "L": 9, "P": 1, "T": 1, "B": 16, "E": 22}.items():
        numbers = sorted(int(i[1:]) for i in KNOWN if i[0] == letter)
        assert numbers == [*range(1, len(numbers) + 1)] and len(numbers) >= least, letter


def test_citations_are_found_in_each_of_their_forms():
    text = "**Ours (M11, M12).** (decision L5) E16 to E18; see (T1 and T2), not (a) or F1"
    assert cited(text) == {"M11", "M12", "L5", "E16", "E17", "E18", "T1", "T2"}


def test_every_citation_is_in_a_log():
    books = [p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    texts = {p: "\n".join(map(source, cells(p))) for p in [*books]}
    texts |= {p: p.read_text() for p in (ROOT / "afen").rglob("*.py")}
    texts |= {NBS / f"{name}.toml": (NBS / f"{name}.toml").read_text() for name in LOGS}
    found = {path: cited(text) for path, text in texts.items()}
    assert len(set().union(*found.values())) > 40
    lost = {str(p): sorted(ids - KNOWN) for p, ids in found.items() if ids - KNOWN}
    assert not lost, lost


def test_every_decision_leads_to_a_heading_of_a_notebook_that_cites_it():
    for entry in entries("decisions"):
        notebook, heading = entry["see"]
        assert heading in headings(NBS / notebook), entry["id"]
        assert entry["id"] in cited("\n".join(map(source, cells(NBS / notebook))))


@pytest.mark.parametrize("name", LOGS)
def test_links_lead_somewhere(name):
    text = "\n".join(source(c) for c in cells(NBS / f"{name}.ipynb", "markdown"))
    text += "".join(committed(name))
    links = re.findall(r"\]\(([^)#]+\.ipynb)?(?:#([^)]*))?\)", text)
    assert links
    for notebook, anchor in links:
        known = {h.replace(" ", "-") for h in headings(NBS / (notebook or f"{name}.ipynb"))}
        assert not anchor or unquote(anchor) in known, (notebook, anchor)


def test_every_computed_erratum_has_a_place_in_the_notebook():
    text = "\n".join(source(c) for c in cells(NBS / "errata.ipynb", "markdown"))
    heads = "\n".join(re.findall(r"^#+ .+|\*\*E\d.+?\*\*", text, re.M))
    spread = cited(heads) | set(re.findall(r"\bE\d{1,2}\b", heads))
    for entry in entries("errata"):
        assert entry["check"] == "read" or entry["id"] in spread, entry["id"]


TEXTS = ("text/markdown", "text/html")  # a page's words, and its tables


def texts(cell: dict) -> list[str]:
    """What a committed cell shows as Markdown or HTML."""
    data = [output.get("data", {}) for output in cell["outputs"]]
    return [settled("".join(d[kind])) for d in data for kind in TEXTS if kind in d]


def settled(page: str) -> str:
    """Without the random name that pandas gives to a styled table."""
    return re.sub(r"\bT_([0-9a-f]{8}_\d+|[0-9a-f]{5})", "T_", page).strip()


def committed(name: str) -> list[str]:
    """What the committed notebook shows as Markdown or HTML."""
    return [text for c in cells(NBS / f"{name}.ipynb", "code") for text in texts(c)]


def rerun(name: str) -> tuple[list[str], dict]:
    """What its cells show today, up to the last that does; the names they define."""
    todo = cells(NBS / f"{name}.ipynb", "code")
    shown = [bool(texts(cell)) for cell in todo]
    last, pages, names = len(todo) - shown[::-1].index(True), [], {}
    for cell, page in list(zip(todo, shown))[:last]:
        tree = ast.parse(source(cell))
        if page:
            value = ast.Expression(tree.body.pop().value)
        exec(compile(tree, name, "exec"), names)
        if page:
            made = eval(compile(value, name, "eval"), names)
            html = getattr(made, "_repr_html_", lambda: made.data)
            pages.append(settled(html()))
    return pages, names


@pytest.fixture(scope="module")
def decisions():
    return rerun("decisions")


def test_the_decisions_page_is_what_log_code_and_records_give(decisions):
    pages, _ = decisions
    assert len(pages) == 8  # the count, six letters, and what a recipe is worth
    now, kept = "\n".join(pages), "\n".join(committed("decisions"))
    assert now == kept, "run: python tests/run_notebooks.py decisions"


def test_the_errata_page_is_what_the_list_gives():
    pages, _ = rerun("errata")
    assert len(pages) > 8 and sum("<table" in page for page in pages) > 6
    assert pages == committed("errata"), "run: python tests/run_notebooks.py errata"


def test_a_changed_cell_of_a_table_would_be_seen():
    styled = [page for page in committed("errata") if "T_" in page]
    assert len(styled) == 2  # gains, departures
    gains = styled[0].replace("1.86", "1.87")
    assert gains != styled[0] and settled(gains) != settled(styled[0])
    assert settled(styled[0].replace("T_", "T_0a1b2")) == styled[0]


def test_a_wrong_default_and_an_unknown_switch_are_refused(decisions):
    check = decisions[1]["check_default"]
    check("afen.methods.afen.AFEN(mecs_after='layer2')")
    for wrong in ["afen.mecs.MECS(gate='mean_sigmoid')", "afen.method.Recipe(warmpu=10)"]:
        with pytest.raises(ValueError):
            check(wrong)


def test_every_decision_is_on_the_page_with_all_its_alternatives(decisions):
    page = "\n".join(decisions[0])
    for entry in entries("decisions"):
        assert f"[{entry['id']}](" in page
        for other in entry.get("other", []):
            assert other.get("set", other.get("python", "")[5:]) in page


def alternatives():
    return [(e, o) for e in entries("decisions") for o in e.get("other", [])]


def test_every_alternative_is_run_or_tested_or_said_to_be_neither(decisions):
    names = decisions[1]
    page = "\n".join(decisions[0][1:])
    for entry, other in alternatives():
        mark = names["mark"](entry, other)
        assert mark in ("in the grid", "shown by a test", "not measured")
        how = other.get("set") or other["python"].removeprefix("afen.")
        line = f"| {entry['id']} | {names['text'](other['what'])} | `{how}` | {mark}"
        assert line in page
        results = [names["outcome"](entry, other, d) for d in names["SETTINGS"]]
        assert (mark == "in the grid") == (results != ["-", "-"]), entry["id"]


def test_a_named_test_is_there_and_is_about_the_alternative(decisions):
    typed = decisions[1]["typed_parameters"]
    named = [(entry, other) for entry, other in alternatives() if "test" in other]
    assert named
    for entry, other in named:
        path, _, name = other["test"].partition("::")
        body = ast.parse((ROOT / path).read_text()).body
        (test,) = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == name]
        words = ast.unparse(test)
        if "EVERY_OPTION" not in words:  # it names the argument, or the value
            text = other.get("set") or other["python"].partition("(")[2]
            assert set(re.findall(r"\w{3,}", text)) & set(re.findall(r"\w+", words)), entry
            continue
        ((switches, chosen),) = typed(other["set"])["options"].items()
        if len(chosen) > 1:  # a last layer of zero cannot be had with every option
            chosen.pop("join")
        ((switch, option),) = chosen.items()
        assert (switches.removesuffix("_switches"), switch, option) in EVERY_OPTION


def test_an_effect_is_paired_by_seed(decisions):
    """Invented records: three seeds of our choice, three of another, the last failed."""
    names = decisions[1]

    def invented(line, seed, value):
        mean = {"mean": {"mAP": value}}
        scores = dict.fromkeys(names["SETTINGS"]["pocket-regdb"], mean)
        name = names["run_names"](line, "pocket-regdb")[seed]
        return {name: {"scores": {} if value is None else scores}}

    made, other = {}, "-p mecs none"
    for seed, ours, theirs in [(4, 0.5, 0.6), (5, 0.5, 0.4), (6, 0.5, None)]:
        made |= invented("", seed, ours) | invented(other, seed, theirs)
    gain = names["differences"](made, "", other, "pocket-regdb")
    np.testing.assert_allclose(gain, [10, -10])
    assert not len(names["differences"]({}, "", other, "pocket-regdb"))
    planned = run_id(names["plan_of"](other).parameters | {"seed": 4})
    assert planned in made and planned in names["grid_ids"]


def test_a_line_is_read_as_papermill_reads_it(decisions):
    typed = decisions[1]["typed_parameters"]
    line = "-p stable False -y 'options: {mecs_switches: {strips: [7, 11]}}'"
    assert typed(line) == {
        "stable": False, "options": {"mecs_switches": {"strips": [7, 11]}},
    }  # fmt: skip
    assert typed("") == {}


def test_every_row_has_a_decision():
    """Each method of Table 1 is named in the rows of some decision."""
    named = " ".join(entry["rows"] for entry in entries("decisions"))
    for title in published()["title"].unique():
        assert title in named, title
