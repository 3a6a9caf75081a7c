"""The site: built without a warning, whole, and working in a browser."""

import ast
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest
import yaml
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
DOCS, HTML = ROOT / "docs", ROOT / "docs" / "_build" / "html"
sys.path.insert(0, str(DOCS))
pytest.importorskip("sphinx", reason="The site's packages are missing: make install.")
import build_pages  # noqa: E402
import codecheck  # noqa: E402
import pages  # noqa: E402
from stage import Stage, code_cell, jupyter_slug, notebooks  # noqa: E402


# --- what the pages are made from -----------------------------------------------------


def test_every_notebook_has_a_place():
    listed = [page for part in build_pages.sections() for page in part["pages"]]
    assert len(listed) == len(set(listed))
    assert set(notebooks()) <= set(listed)


def test_a_notebook_without_a_place_stops_the_build(monkeypatch):
    monkeypatch.setattr(build_pages, "notebooks", lambda: [*notebooks(), "nbs/stray"])
    with pytest.raises(SystemExit, match="no place for nbs/stray"):
        build_pages.sections()


def test_links_of_a_page_become_links_of_the_site(tmp_path):
    stage = Stage(tmp_path)
    given = {
        "[a](table1.ipynb#AFEN)": "[a](table1.ipynb#AFEN)",
        "[b](../figures/table1.csv)": '<a href="../figures/table1.csv">b</a>',
        "[c](methods)": "c",  # a folder
        "[d](#x)": "[d](#x)",
        "[e](../docs/ethics.md)": "[e](../ethics.md)",
    }
    for link, expected in given.items():
        assert stage.links("nbs/index.ipynb", link) == expected
    assert (tmp_path / "extra" / "figures" / "table1.csv").exists()
    code = "```\n[c](methods)\n```"
    assert stage.links("nbs/index.ipynb", code) == code
    html = stage.links("nbs/index.ipynb", '<a href="table1.ipynb#AFEN">x</a>')
    assert html == '<a href="table1.html#AFEN">x</a>'


def test_directives_become_tags():
    cell = {"cell_type": "code", "metadata": {"jupyter": {"source_hidden": True}}}
    cell |= {"source": ["#| export\n", "x = 1\n"], "outputs": []}
    assert code_cell(cell) and cell["source"] == "x = 1"
    assert cell["metadata"]["tags"] == ["exported", "hide-input"]
    only = {"metadata": {}, "source": ["#| default_exp mecs"], "outputs": []}
    assert not code_cell(only)


def test_anchors_are_jupyters():
    assert jupyter_slug("Which places: Eqs. (3)") == "Which-places:-Eqs.-(3)"


PARTS = tomllib.loads((DOCS / "paper_map.toml").read_text())["section"]
LINES = [(part["number"], line) for part in PARTS for line in part["line"]]


def test_the_papers_map_leaves_out_no_sentence_and_no_equation():
    counts = {p["number"]: [x["sentence"] for x in p["line"] if "sentence" in x] for p in PARTS}
    expected = {"3.1": 4, "3.1.1": 15, "3.1.2": 7, "3.2": 16, "3.3": 9, "4.1": 8}
    assert {k: len(v) for k, v in counts.items()} == expected  # counted in the paper
    assert all(v == [*range(1, len(v) + 1)] for v in counts.values())
    assert [x["equation"] for _, x in LINES if "equation" in x] == [*range(1, 10)]


def line_name(value):
    """For a test's name."""
    if isinstance(value, dict):
        return str(value.get("sentence") or f"eq{value['equation']}")
    return value


@pytest.mark.parametrize("section, line", LINES, ids=line_name)
def test_the_papers_map_leads_somewhere(section, line):
    assert len(line["words"].split()) <= 12, "quote a few words only"
    for symbol in line.get("code", []):
        assert pages.find(symbol)["cell"]
    for test in line.get("tests", []):
        file, name = test.split("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in [getattr(node, "name", None) for node in tree.body], test
    logs = [(ROOT / "nbs" / f"{log}.toml").read_text() for log in ("decisions", "errata")]
    known = re.findall(r'^id = "(\w+)"', "\n".join(logs), re.M)
    assert set(line.get("see", [])) <= set(known)
    assert line.get("tests") if "code" in line else line["why"]


@pytest.mark.parametrize("path", pages.module_paths(), ids=pages.dotted)
def test_the_reference_has_every_exported_name(path):
    names = pages.exported(ast.parse(path.read_text()))
    assert set(pages.symbols(path)) == set(names)


def test_the_reference_shows_arguments_with_their_comments():
    text = pages.api()["afen.mecs"]
    assert "x: Tensor,  # [B, C, H, W]" in text and "Raises ValueError" in text


def test_a_symbol_that_is_nowhere_is_named():
    with pytest.raises(KeyError, match="afen.mecs.Nothing"):
        pages.find("afen.mecs.Nothing")


def test_messages_are_found_in_each_of_their_forms(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        'def f():\n    raise ValueError(f"{x.name} is bad: "\n        "mend it.")\n'
        'class A:\n    def g(self):\n        raise OSError("one" + f" {n + 1}") from e\n'
        "def h(e):\n    raise e\n"
    )
    bad = ("ValueError", "<name> is bad: mend it.", "f")
    assert pages.messages(module) == [bad, ("OSError", "one <n>", "A")]


def test_every_figure_names_its_notebook():
    for path in sorted((ROOT / "figures").iterdir()):
        assert pages.maker(path.stem) in notebooks()


def has_numbers(path):
    """Whether a figure's table has a score or an effect; not if nothing of it was run."""
    table = pd.read_csv(path)
    return table["mean" if "mean" in table else "value"].notna().any()


CAPTIONED = sorted((ROOT / "figures").glob("smoke_*.txt"))


@pytest.mark.parametrize("path", CAPTIONED, ids=lambda p: p.stem)
def test_every_figure_leads_to_its_records(path):
    ids = pages.record_ids(path.with_suffix(".csv"))
    kept = {p.stem for p in (ROOT / "data" / "records").glob("*.json")}
    assert set(ids) <= kept
    assert ids or not has_numbers(path.with_suffix(".csv"))


def test_the_manifest_is_complete():
    written = (ROOT / "codecheck.yml").read_text()
    assert written == codecheck.manifest(), "run python docs/codecheck.py"
    files = {entry["file"] for entry in yaml.safe_load(written)["manifest"]}
    assert files == {f"figures/{p.name}" for p in (ROOT / "figures").iterdir()}


# --- the papers behind the code -------------------------------------------------------


def test_croissant_has_its_required_fields():
    data = json.loads((DOCS / "rendered_people.json").read_text())
    assert data["@type"] == "sc:Dataset"
    assert data["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    for name in ("@context", "name", "description", "license", "url", "creator"):
        assert data[name]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", data["datePublished"])
    sources = {entry["@id"] for entry in data["distribution"]}
    for entry in data["distribution"]:
        assert entry["name"] and entry["encodingFormat"] and entry["includes"]
    for record in data["recordSet"]:
        for field in record["field"]:
            assert field["@id"] == f"{record['@id']}/{field['name']}" and field["dataType"]
            assert field["source"]["fileSet"]["@id"] in sources


def test_croissant_describes_the_rendered_files():
    """Its patterns fit the layouts that the loaders read."""
    data = json.loads((DOCS / "rendered_people.json").read_text())
    regex = {f["@id"]: f["source"].get("transform", {}).get("regex")
             for r in data["recordSet"] for f in r["field"]}
    regdb, sysu = "pocket-regdb/Visible/47/v_3.bmp", "pocket-sysu/cam5/0042/0003.jpg"
    assert re.search(regex["visible/identity"], regdb)[1] == "47"
    assert re.search(regex["cameras/identity"], sysu)[1] == "0042"
    assert re.search(regex["cameras/camera"], sysu)[1] == "5"


def test_the_model_cards_fields_are_a_records():
    record = json.loads(min((ROOT / "data" / "records").glob("*.json")).read_text())
    fields = re.findall(r"`\{([\w.]+)\}`", (DOCS / "model_card.md").read_text())
    assert len(fields) > 10
    for field in fields:
        value = record
        for name in field.split("."):
            value = value[name]


def test_citation_names_paper_and_companion():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in ("cff-version", "message", "title", "authors"):
        assert cff[name]
    assert (cff["version"], cff["license"]) == (project["version"], project["license"])
    names = [author["family-names"] for author in cff["preferred-citation"]["authors"]]
    assert names == ["Feng", "Ma"]


def test_workflows_and_container_call_what_there_is():
    makefile = (ROOT / "Makefile").read_text()
    paths = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    commands = [container["postCreateCommand"]]
    for path in paths:
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            commands += [step["run"] for step in job["steps"] if "run" in step]
    targets = [c.split()[1] for c in commands if c.startswith("make ")]
    assert {"docs", "test", "install"} <= set(targets)
    assert all(re.search(rf"^{t}:", makefile, re.M) for t in targets)


def test_the_sites_packages_are_pinned():
    pins = (ROOT / "constraints.txt").read_text().lower()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in extras["optional-dependencies"]["docs"]:
        assert re.split(r"[<>=]", wanted)[0] + "==" in pins


def test_the_glossary_has_the_words_of_the_pages():
    text = (DOCS / "glossary.md").read_text()
    words = ["gallery", "idle", "modality", "protocol", "query", "row", "smoke", "split"]
    for word in [*words, "trial", "verdict"]:
        assert re.search(rf"^{word}$", text, re.M), word


# --- the site as it was built ---------------------------------------------------------


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The built site; one worker of pytest builds it, the others wait."""
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    log = shared / "site.log"
    with FileLock(shared / "site.lock"):
        if not log.exists():
            sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q"]
            folders = [DOCS, DOCS / "_build" / "source", HTML]
            build = [[sys.executable, DOCS / "build_pages.py"], [*sphinx, "-E", "-c", *folders]]
            text = ""
            for command in build:
                done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
                text += done.stdout + done.stderr
                text += f"exit {done.returncode}\n" if done.returncode else ""
            log.write_text(text)
    (HTML.parent / "log.txt").write_text(log.read_text())
    return HTML


class Page(HTMLParser):
    """The anchors of a page, what it links to, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids, self.links, self.loads = set(), set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        self.ids |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.add(values["href"])
        if tag in ("img", "script", "source", "iframe") and values.get("src"):
            self.loads.add(values["src"])
        if tag == "link" and values.get("rel") not in ("canonical", None):
            self.loads.add(values["href"])


def html_pages(site: Path) -> list[Path]:
    """All pages; what the theme keeps among its files is none."""
    return [path for path in site.rglob("*.html") if "_static" not in path.parts]


def test_the_site_is_built_without_a_warning(site):
    log = (site.parent / "log.txt").read_text()
    assert not log, log[-3000:]
    for name in notebooks():
        assert (site / f"{name}.html").exists()


def test_every_internal_link_and_anchor_exists(site):
    parsed = {path: Page(path) for path in html_pages(site)}
    broken = []
    for path, page in parsed.items():
        for link in page.links | page.loads:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            there = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not there.exists():
                broken.append((path.name, link))
            elif url.fragment and there in parsed:
                known = parsed[there].ids
                if not {url.fragment, unquote(url.fragment)} & known:
                    broken.append((path.name, link))
    assert not broken, broken[:10]


def test_nothing_is_loaded_from_elsewhere(site):
    for path in html_pages(site):
        outside = [x for x in Page(path).loads if re.match(r"(https?:)?//", x)]
        assert not outside, (path.name, outside)


# --- in a browser ---------------------------------------------------------------------

class Quiet(SimpleHTTPRequestHandler):
    """A server that writes no log."""

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def tab(browser, address):
    """A tab that notes errors, and requests that leave the machine."""
    page = browser.new_page()
    page.trouble = []
    page.on("console", lambda m: m.type == "error" and page.trouble.append(m.text))
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on("requestfailed", lambda r: page.trouble.append(r.url))
    away = re.compile(rf"^(?!{re.escape(address)}|data:|blob:)")
    page.route(away, lambda route: (page.trouble.append(route.request.url), route.abort()))
    yield page
    page.close()
    assert page.trouble == []


MEASURE = """() => ({
  over: document.documentElement.scrollWidth - innerWidth,
  math: document.querySelectorAll('.math').length,
  drawn: document.querySelectorAll('.math mjx-container').length,
  bad: [...document.querySelectorAll('mjx-merror')].map(e => e.textContent),
  cut: [...document.querySelectorAll('div.math')].filter(box => {
    const frame = box.getBoundingClientRect();
    const inside = box.querySelector('mjx-math').getBoundingClientRect();
    const wide = inside.right > frame.right + 1;  // then it scrolls, from its left end
    return frame.right > innerWidth || inside.left < frame.left - 1
      || wide && getComputedStyle(box).overflowX != 'auto';
  }).map(box => box.textContent.slice(0, 60)),
})"""


def look(tab, url, width):
    """What a page measures at a width, its equations set."""
    tab.set_viewport_size({"width": width, "height": 900})
    tab.goto(url)
    if tab.locator(".math").count():
        tab.wait_for_function("window.MathJax && MathJax.startup && MathJax.startup.promise")
        tab.evaluate("MathJax.startup.promise.then(() => true)")
    return tab.evaluate(MEASURE)


WITH_MATH = ["*_mecs", "*_fem", "*_losses", "*_evaluation", "*_backbone", "errata"]
SHOWN = ["index", "paper_map", "figures", "glossary", "errors", "api/afen.mecs", "results"]
SHOWN += ["nbs/index", "nbs/table1", "nbs/claims", "nbs/decisions", "README"]


def shown(site: Path) -> list[str]:
    """Pages of every kind, and all with many equations."""
    names = [p for pattern in WITH_MATH for p in site.glob(f"nbs/{pattern}.html")]
    found = [p.relative_to(site).as_posix() for p in names]
    return [*found, *(f"{name}.html" for name in SHOWN)]


@pytest.mark.parametrize("width", [390, 800, 1280])
def test_pages_fit_and_equations_are_set(tab, address, site, width):
    for name in shown(site):
        found = look(tab, f"{address}/{name}", width)
        assert found["over"] <= 0, f"{name} is {found['over']} pixels too wide"
        assert found["drawn"] == found["math"], name
        assert found["bad"] == found["cut"] == [], name


def test_equations_carry_the_papers_numbers(tab, address, site):
    (path,) = site.glob("nbs/*_mecs.html")
    look(tab, f"{address}/nbs/{path.name}", 800)
    tagged = tab.locator("mjx-assistive-mml mlabeledtr").all_text_contents()
    for number in range(1, 5):
        assert any(text.startswith(f"({number})") for text in tagged), number


def test_search_finds_the_median(tab, address):
    tab.goto(f"{address}/search.html?q=median")
    tab.wait_for_selector("#search-results li a")
    found = tab.locator("#search-results li a").evaluate_all("a => a.map(x => x.href)")
    assert any(re.search(r"_mecs\.html|afen\.mecs\.html", link) for link in found)


def choose_theme(tab, mode):
    """Use the page's own menu, by keyboard."""
    tab.locator("button.theme-switch-button:visible").first.press("Enter")
    tab.locator(f"button.theme-change-button[data-mode={mode}]:visible").press("Enter")


def test_the_theme_becomes_dark_and_stays_so(tab, address):
    tab.set_viewport_size({"width": 1280, "height": 900})
    tab.goto(f"{address}/index.html")
    paper, seen = "getComputedStyle(document.body).backgroundColor", {}
    for mode in ("light", "dark"):
        choose_theme(tab, mode)
        seen[mode] = tab.evaluate(paper)
    assert seen["light"] != seen["dark"]
    tab.goto(f"{address}/glossary.html")
    assert tab.evaluate(paper) == seen["dark"]
    choose_theme(tab, "auto")


def test_folded_code_opens(tab, address, site):
    page = next(p for p in site.glob("nbs/*.html") if "hide-input" in p.read_text())
    tab.goto(f"{address}/nbs/{page.name}")
    fold = tab.locator("details.hide").first
    assert not fold.evaluate("d => d.open")
    fold.locator("summary").press("Enter")
    assert fold.evaluate("d => d.open")


def test_previous_and_next_lead_through_the_site(tab, address):
    tab.goto(f"{address}/nbs/index.html")
    tab.locator("a.right-next").click()
    assert tab.locator("h1").first.inner_text().startswith("Table 1")
    tab.locator("a.left-prev").click()
    assert tab.url == f"{address}/nbs/index.html"


def test_table_1_works_by_keyboard(tab, address):
    tab.goto(f"{address}/figures/table1.html")
    head = tab.locator("thead th").nth(1)
    for _ in range(10):  # to the second column's button
        tab.keyboard.press("Tab")
        if head.evaluate("th => th.contains(document.activeElement)"):
            break
    column = "tr => tr.map(x => parseFloat(x.cells[1].dataset.value))"
    for way in ("ascending", "descending"):
        tab.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == way
        values = tab.locator("tbody").first.locator("tr").evaluate_all(column)
        assert values == sorted(values, reverse=way == "descending")


def test_a_number_of_table_1_opens_to_its_source(tab, address):
    tab.goto(f"{address}/figures/table1.html")
    cell = tab.locator("tbody").first.locator("td").first
    assert not cell.locator("dl").is_visible()
    cell.locator("summary").press("Enter")
    assert "paper" in cell.locator("dl").inner_text()
    assert tab.locator(".banner").count() == 1 and "not run" in tab.locator(".banner").inner_text()
    seen = set()
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        seen.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(seen) == 2
