"""The project's own order: packaging, notebooks, rooms."""

import ast
import configparser
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from afen.records import read_record

sys.path.insert(0, str(Path(__file__).parent))
from run_notebooks import source_hash  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
ROOMS = [
    "core", "people", "datasets", "batches", "augment", "joints", "corruptions",
    "backbone", "blocks",
    "mecs", "fem", "losses", "method", "ranks", "verdicts", "methods", "evaluation",
    "training", "records", "tables", "figures", "runs", "grid", "trained", "probes", "claims",
    "findings", "maps", "retrieval", "export", "released", "report", "cli", "pretrain",
]  # fmt: skip


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


def test_settings_and_pyproject_agree():
    ours = settings()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert ours["lib_name"] == project["name"]
    assert ours["version"] == project["version"]
    assert ours["description"] == project["description"]
    assert sorted(ours["requirements"].split()) == sorted(project["dependencies"])
    dev = project["optional-dependencies"]["dev"]
    assert sorted(ours["dev_requirements"].split()) == sorted(dev)


def test_constraints_pin_every_requirement():
    pins = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    pinned = set(re.findall(r"^([a-z0-9.-]+)==", pins, re.M))
    wanted = settings()["requirements"].split() + settings()["dev_requirements"].split()
    names = {re.split(r"[<>=]", word)[0] for word in wanted}
    assert names <= pinned, names - pinned


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_executed_and_small(path):
    book = json.loads(path.read_text())
    assert path.stat().st_size < 1_000_000
    cells = [c for c in book["cells"] if c["cell_type"] == "code"]
    outputs = [o for c in cells for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert outputs, "no cell has an output: was it executed?"
    first = "".join(book["cells"][0]["source"])
    assert re.match(r"# .+\n\n?> .+", first), "an H1 and a one-line summary come first"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_belong_to_the_code_above_them(path):
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    sources = ["".join(c["source"]) for c in cells if c["outputs"]]
    ran = [c["metadata"].get("source_hash") for c in cells if c["outputs"]]
    stale = [s for s, ran in zip(sources, ran) if ran != source_hash(s)]
    assert not stale, f"run `python tests/run_notebooks.py`; changed since: {stale[0]}"


def figure_numbers(cells: list[dict]) -> list[list[int]]:
    """For each code cell that draws, the numbers of the captions beside it."""
    each = []
    for cell, after in zip(cells, [*cells[1:], {"cell_type": "raw"}]):
        data = [output.get("data", {}) for output in cell.get("outputs", [])]
        if any("image/png" in one for one in data):
            beside = ["".join(one.get("text/markdown", "")) for one in data]
            if after["cell_type"] == "markdown":
                beside.append("".join(after["source"]))
            found = re.findall(r"^\*\*Figure (\d+)\.\*\* \S", "\n".join(beside), re.M)
            each.append([int(number) for number in found])
    return each


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_figure_is_numbered_and_captioned(path):
    each = figure_numbers(json.loads(path.read_text())["cells"])
    assert all(each), f"cells that draw without a caption: {each}"
    numbers = [number for some in each for number in some]
    assert numbers == [*range(1, len(numbers) + 1)]


def test_a_figure_without_its_caption_is_found():
    drawn = {"cell_type": "code", "outputs": [{"data": {"image/png": "..."}}]}
    words = {"cell_type": "markdown", "source": ["**Figure 1.** A line.\n"]}
    loop = {"data": {"text/markdown": ["**Figure 2.** One more."]}}
    looped = {"cell_type": "code", "outputs": [*drawn["outputs"], loop]}
    assert figure_numbers([drawn, words, looped]) == [[1], [2]]
    assert figure_numbers([words, drawn, drawn, words, drawn]) == [[], [1], []]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_lines_fit(path):
    book = json.loads(path.read_text())
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            wide = [x for x in "".join(cell["source"]).splitlines() if len(x) > 99]
            assert not wide, wide


def test_every_notebook_exports_its_own_module():
    found = []
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text())["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        found += re.findall(r"^#\| default_exp (\S+)$", code, re.M)
    modules = [path for path in (ROOT / "afen").rglob("*.py") if path.name[0] != "_"]
    names = [p.relative_to(ROOT / "afen").with_suffix("").as_posix() for p in modules]
    assert sorted(found) == sorted(name.replace("/", ".") for name in names)


def imports(path: Path) -> set[str]:
    """The rooms that a module imports."""
    here = path.relative_to(ROOT / "afen").parts[:-1]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("afen."):
            rooms.add(node.module.split(".")[1])  # nbdev leaves imports of several lines
        if isinstance(node, ast.ImportFrom) and node.level:
            up = here[: len(here) - (node.level - 1)]
            names = [node.module] if node.module else [a.name for a in node.names]
            rooms |= {".".join((*up, name)).split(".")[0] for name in names}
    return rooms


def test_a_room_imports_only_rooms_above_it():
    for path in sorted((ROOT / "afen").rglob("*.py")):
        parts = path.relative_to(ROOT / "afen").with_suffix("").parts
        if parts[-1].startswith("_"):
            continue
        order = ROOMS.index(parts[0])
        for room in imports(path):
            assert ROOMS.index(room) <= order, f"{parts} imports {room}"


def test_measuring_never_imports_a_model():
    models = {"backbone", "blocks", "mecs", "fem", "losses", "method", "methods", "training"}
    for room in ("evaluation", "records", "tables", "figures"):
        assert not imports(ROOT / "afen" / f"{room}.py") & models


def test_methods_never_import_data_or_training():
    for path in (ROOT / "afen" / "methods").glob("*.py"):
        assert not imports(path) & {"people", "datasets", "batches", "training", "runs"}


def test_every_torch_load_refuses_code():
    for path in (ROOT / "afen").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("weights_only") == "True", path


def test_importing_afen_is_quiet():
    command = [sys.executable, "-W", "error", "-c", "import afen; from afen.mecs import MECS"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


RECORDS = sorted((ROOT / "data" / "records").glob("*.json"))


def test_there_are_records():
    assert RECORDS


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_a_committed_record_is_whole_and_names_itself(path):
    record = read_record(path)
    assert record["id"] == path.stem
    assert record["status"] == "smoke" or not record["data"]["rendered"]
    assert "/" not in record["command"].split()[0]
