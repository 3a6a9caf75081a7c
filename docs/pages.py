"""The generated pages: API reference, paper's map, figures, errors, sections, front."""

import ast
import csv
import json
import re
import tomllib
from pathlib import Path

from stage import ROOT, notebooks

PACKAGE = ROOT / "afen"
CELL = re.compile(r"^# %% (\S+\.ipynb) #(\w+)$", re.M)


# --- symbols --------------------------------------------------------------------------


def module_paths() -> list[Path]:
    """The exported modules, methods last."""
    paths = [p for p in PACKAGE.rglob("*.py") if p.name[0] != "_"]
    return sorted(paths, key=lambda p: (len(p.parts), p))


def dotted(path: Path) -> str:
    """The name under which a module is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def exported(tree: ast.Module) -> list[str]:
    """The names in __all__."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def names_of(node: ast.stmt) -> list[str]:
    """What a statement at the top of a module defines."""
    if isinstance(node, ast.Assign):
        targets = [t.elts if isinstance(t, ast.Tuple) else [t] for t in node.targets]
        return [ast.unparse(t) for group in targets for t in group]
    if isinstance(node, ast.AnnAssign):
        return [ast.unparse(node.target)]
    return [node.name] if hasattr(node, "name") else []


def symbols(path: Path) -> dict[str, dict]:
    """Of each exported name: its syntax tree, its source, the cell that defines it."""
    source = path.read_text()
    tree, cells = ast.parse(source), list(CELL.finditer(source))
    starts = [source.count("\n", 0, m.start()) + 1 for m in cells]
    public, found = set(exported(tree)), {}
    for node in tree.body:
        for name in public.intersection(names_of(node)):
            cell = cells[sum(start <= node.lineno for start in starts) - 1]
            notebook = (path.parent / cell[1]).resolve().relative_to(ROOT)
            place = {"notebook": notebook.with_suffix("").as_posix(), "cell": cell[2]}
            found[name] = {"node": node, "lines": source.splitlines(), **place}
    return found


def signature(entry: dict) -> str:
    """A definition's first lines, its arguments with their comments, as written."""
    node, lines = entry["node"], entry["lines"]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        kept = lines[node.lineno - 1 : node.end_lineno]
        return "\n".join(kept if len(kept) <= 14 else [*kept[:12], "    ..."])
    body = node.body[0]
    if isinstance(node, ast.ClassDef) and len(node.body) == 1 and not docstring(node):
        return "\n".join(lines[node.lineno - 1 : body.end_lineno])
    return "\n".join(lines[node.lineno - 1 : body.lineno - 1]).rstrip()


def methods(entry: dict) -> list[ast.FunctionDef]:
    """A class's constructor and its public methods that say what they do."""
    kinds = ast.FunctionDef, ast.AsyncFunctionDef
    body = [n for n in entry["node"].body if isinstance(n, kinds)]
    said = [n for n in body if n.name[0] != "_" and ast.get_docstring(n)]
    return [n for n in body if n.name == "__init__" and n.args.args[1:]] + said


def docstring(node: ast.AST) -> str:
    """Its docstring as Markdown: brackets and stars of shapes are not markup."""
    text = ast.get_docstring(node) or ""
    pieces = re.split(r"(`[^`]*`)", text)
    pieces[::2] = [re.sub(r"([\[\]*_<>|$\\])", r"\\\1", piece) for piece in pieces[::2]]
    return "".join(pieces)


def entry_text(name: str, entry: dict) -> str:
    """One entry of the API reference."""
    node, notebook = entry["node"], entry["notebook"]
    parts = [f"## {name}", fenced(signature(entry))]
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        parts.append(docstring(node))
    if isinstance(node, ast.ClassDef):
        for method in methods(entry):
            parts.append(fenced(signature(entry | {"node": method})))
            parts.append(docstring(method))
    parts.append(f"Defined in [{notebook}](#cell-{entry['cell']}).")
    return "\n\n".join(part for part in parts if part)


def fenced(code: str) -> str:
    """A block of Python."""
    lines = code.splitlines()
    indent = min((len(x) - len(x.lstrip()) for x in lines if x.strip()), default=0)
    return "```python\n" + "\n".join(line[indent:] for line in lines) + "\n```"


def api() -> dict[str, str]:
    """A page for each module, and the list of them."""
    texts, listed = {}, []
    for path in module_paths():
        name = dotted(path)
        about = ast.get_docstring(ast.parse(path.read_text())) or ""
        entries = symbols(path)
        order = sorted(entries, key=lambda n: entries[n]["node"].lineno)
        body = "\n\n".join(entry_text(n, entries[n]) for n in order)
        texts[name] = f"# {name}\n\n> {docstring_line(about)}\n\n{body}\n"
        listed.append((name, about))
    rows = "\n".join(f"| [{n}]({n}.md) | {docstring_line(about)} |" for n, about in listed)
    texts["index"] = f"""# API

> Every exported name: its arguments with their shapes and units, what it raises, its source.

The page of a module is made from its code. Each entry leads to the cell of the notebook
that defines it, where its equation stands above it and its examples below.

| module | what it answers |
| --- | --- |
{rows}

{toctree([name for name, _ in listed])}"""
    return texts


def docstring_line(text: str) -> str:
    """The first line of a docstring, as one line of Markdown."""
    return re.sub(r"([\[\]*_<>|$])", r"\\\1", text.strip().split("\n")[0])


def find(symbol: str) -> dict:
    """Where a symbol such as afen.mecs.MECS is defined; KeyError when nowhere.

    A module may import it from another one: the definition is looked for there.
    """
    module, _, name = symbol.rpartition(".")
    path = ROOT / (module.replace(".", "/") + ".py")
    if name in (here := symbols(path)):
        return here[name] | {"module": module}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and name in [a.name for a in node.names]:
            package = module.rsplit(".", node.level)[0] + "." if node.level else ""
            return find(f"{package}{node.module}.{name}")
    raise KeyError(f"{symbol} is not defined in {path.relative_to(ROOT)}.")


# --- the paper's map ------------------------------------------------------------------


def paper_map() -> str:
    """Each sentence and equation of the method, its cell and its test."""
    text = ["# The paper, line by line", "> Each sentence and equation of the method, the "
            "cell that implements it, and the test that holds it."]
    text.append("""Sections 3.1 to 3.3 and 4.1 of the paper. Sentences are counted within \
their section, and named by their first words. A sentence without code says why. Decisions \
and errata are those of [decisions](../nbs/decisions.ipynb) and [errata](../nbs/errata.ipynb); \
tests are functions of the folder `tests/`.""")
    table = tomllib.loads((ROOT / "docs" / "paper_map.toml").read_text())
    for part in table["section"]:
        text.append(f"## {part['number']} {part['title']}")
        rows = ["| | the paper | code | held by |", "| --- | --- | --- | --- |"]
        rows += [map_row(line) for line in part["line"]]
        text.append("\n".join(rows))
    return "\n\n".join(text) + "\n"


def map_row(line: dict) -> str:
    """One sentence or equation."""
    number = line.get("sentence") or f"**Eq. ({line['equation']})**"
    code = [symbol_link(symbol) for symbol in line.get("code", [])]
    marks = f" ({', '.join(line['see'])})" if "see" in line else ""
    tests = [f"`{test}`" for test in line.get("tests", [])]
    held = "; ".join(tests) if tests else "" if code else line["why"]
    if tests and "why" in line:
        held += f"; {line['why']}"
    words = line["words"].replace("|", "\\|")
    return f"| {number} | {words} | {', '.join(code)}{marks} | {held} |"


def symbol_link(symbol: str) -> str:
    """A link to the cell that defines a symbol."""
    return f"[{symbol.removeprefix('afen.')}](#cell-{find(symbol)['cell']})"


# --- figures --------------------------------------------------------------------------


def maker(stem: str) -> str:
    """The notebook that made figures/<stem>.*; KeyError when none is known."""
    words = stem.removeprefix("smoke_")
    pages = sorted(notebooks(), key=lambda n: (n[4:5].isdigit(), -len(n)))
    for name in pages:  # a page of results before the module that it uses
        short = re.sub(r"^\d+_", "", Path(name).name)
        if words == short or words.startswith(short + "_"):
            return name
    if words == "paper_size":  # measured by hand, shown by this page
        return "nbs/pocket"
    raise KeyError(f"No notebook is known to make figures/{stem}.*: see docs/pages.py.")


def record_ids(table: Path) -> list[str]:
    """The runs whose numbers a figure's table holds."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        rows = [row.get("id") or row.get("run") or "" for row in csv.DictReader(file)]
    return sorted({name for row in rows for name in row.split()})  # a mean has several


def run_links(stem: str) -> str:
    """Folded links to the kept records of a figure's runs."""
    ids = record_ids(ROOT / "figures" / f"{stem}.csv")
    if not ids:
        smoke = "Its table names no runs; the notebook says which they are."
        return smoke if stem.startswith("smoke_") else "It is drawn from no run."
    kept = [i for i in ids if (ROOT / "data" / "records" / f"{i}.json").exists()]
    links = ", ".join(f"[{i}](../data/records/{i}.json)" for i in kept)
    word = "record" if len(kept) == 1 else "records"
    return f"<details><summary>{len(kept)} {word}</summary>\n\n{links}\n\n</details>"


def figures() -> str:
    """Every generated figure and table, its records and its notebook."""
    text = ["# Figures and their records", "> Every generated figure, the records its "
            "numbers come from, and the notebook that made it."]
    folder = ROOT / "figures"
    for caption in sorted(folder.glob("*.txt")):
        stem = caption.stem
        text += [f"## {stem}", f"![{stem}](../figures/{stem}.png)", caption.read_text()]
        files = [p.suffix[1:] for p in sorted(folder.glob(f"{stem}.*"))]
        links = ", ".join(f"[{end}](../figures/{stem}.{end})" for end in files)
        made = maker(stem)
        text.append(f"Made by [{made}](../{made}.ipynb); {links}.")
        text.append(run_links(stem))
    pictured = {path.stem for path in folder.glob("*.txt")}
    rows = ["| file | made by |", "| --- | --- |"]
    for path in sorted(folder.iterdir()):
        if path.stem not in pictured:
            made = maker(path.stem)
            rows.append(f"| [{path.name}](../figures/{path.name}) | [{made}](../{made}.ipynb) |")
    text += ["## Tables", "\n".join(rows)]
    return "\n\n".join(part for part in text if part) + "\n"


# --- errors ---------------------------------------------------------------------------


def template(node: ast.expr) -> str | None:
    """A message as it stands in the code, what is filled in as <name>."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp):
        left, right = template(node.left), template(node.right)
        return None if left is None or right is None else left + right
    if not isinstance(node, ast.JoinedStr):
        return None
    filled = (v.value if isinstance(v, ast.Constant) else hole(v) for v in node.values)
    return "".join(filled)


def hole(value: ast.FormattedValue) -> str:
    """What an expression in a message is called."""
    words = re.findall(r"[A-Za-z_]\w*", ast.unparse(value.value))
    return f"<{words[-1] if words else '...'}>"


def messages(path: Path) -> list[tuple[str, str, str]]:
    """Error, message and function of each sentence that a module raises."""
    found = []
    for top in ast.parse(path.read_text()).body:
        for node in ast.walk(top):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and call.args:
                said = template(call.args[0])
                if said and " " in said:
                    found.append((ast.unparse(call.func), said, getattr(top, "name", "")))
    return found


def errors() -> str:
    """The hand-written beginning, and every message of the package."""
    text = [(ROOT / "docs" / "errors.txt").read_text().strip()]
    for path in module_paths():
        rows = ["| error | message | raised in |", "| --- | --- | --- |"]
        for kind, said, where in messages(path):
            said = re.sub(r"([\[\]*_<>|$`])", r"\\\1", " ".join(said.split()))
            rows.append(f"| {kind} | {said} | `{where}` |")
        if len(rows) > 2:
            text += [f"### {dotted(path)}", "\n".join(rows)]
    return "\n\n".join(text) + "\n"


GENERATED = {"paper_map": paper_map, "figures": figures, "errors": errors}


# --- contents -------------------------------------------------------------------------


def toctree(names: list[str]) -> str:
    """Sphinx's list of the pages below this one; it shows in the side bar only."""
    return "```{toctree}\n:hidden:\n\n" + "\n".join(names) + "\n```\n"


def title_and_summary(source: Path, name: str) -> tuple[str, str]:
    """A page's first heading, and the line that follows it after `>`."""
    path = source / f"{name}.ipynb"
    if path.exists():
        text = json.loads(path.read_text())["cells"][0]["source"]
    else:
        text = (source / f"{name}.md").read_text()
    title = re.search(r"^# (.+)$", text, re.M)[1]
    summary = re.search(r"^> (.+(?:\n> .+)*)", text, re.M)
    summary = summary or re.search(r"^# .+\n\n([A-Z][^:.]+[.:])", text)
    words = re.sub(r"\n(> )?", " ", summary[1]) if summary else ""
    return title, words.replace(":", ".") if words.endswith(":") else words


def section(source: Path, part: dict) -> str:
    """The page of a section: what each of its pages answers."""
    rows = ["| page | what it answers |", "| --- | --- |"]
    for name in part["pages"]:
        title, summary = title_and_summary(source, name)
        end = ".ipynb" if (source / f"{name}.ipynb").exists() else ".md"
        rows.append(f"| [{title}]({name}{end}) | {summary} |")
    table, tree = "\n".join(rows), toctree(part["pages"])
    return f"# {part['title']}\n\n{part['intro']}\n\n{table}\n\n{tree}"


def front(table: list[dict], text: str) -> str:
    """The first page: the state of the reproduction, and all sections."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- generated: state -->\n(.+?)<!-- end", readme, re.S)[1]
    state = block.split("\n|")[0].strip()  # without its table
    tree = toctree([*(part["page"] for part in table), "api/index"])
    return text.replace("{{state}}", state) + "\n" + tree
