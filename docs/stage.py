"""From the repository to the tree that Sphinx reads: notebooks, pages, and their links.

A page keeps its path, except that docs/x.md becomes x.md. A link to a notebook or page
stays a link between pages; a file that is no page is copied beside the site; a folder
is named without a link.
"""

import json
import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md"]
PAGES += ["data/published/README.md", "tests/golden/README.md"]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def notebooks() -> list[str]:
    """Paths of all notebooks, without their suffix: nbs/11_mecs, nbs/methods/caj, ..."""
    paths = (ROOT / "nbs").rglob("*.ipynb")
    kept = [p for p in paths if ".ipynb_checkpoints" not in p.parts]
    return sorted(p.relative_to(ROOT).with_suffix("").as_posix() for p in kept)


def staged() -> dict[str, str]:
    """Where in the site each page of the repository is: its path, and its new path."""
    pages = {f"{name}.ipynb": f"{name}.ipynb" for name in notebooks()}
    pages |= {name: name for name in PAGES if (ROOT / name).exists()}
    return pages | {f"docs/{p.name}": p.name for p in sorted((ROOT / "docs").glob("*.md"))}


def jupyter_slug(title: str) -> str:
    """The anchor that JupyterLab gives a heading."""
    return title.strip().replace(" ", "-")


def write(path: Path, text: str) -> None:
    """Write `text` unless the file holds it, so that Sphinx builds only what changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class Stage:
    """The folder that Sphinx reads, `source`, and the files beside the site, `extra`."""

    def __init__(self, out: Path) -> None:
        self.source, self.extra, self.pages = out / "source", out / "extra", staged()
        self.written: set[Path] = set()

    def text(self, name: str, text: str) -> None:
        """Write a page of the site."""
        write(self.source / name, text)
        self.written.add(self.source / name)

    def copy(self, name: str, where: Path) -> None:
        """Copy a file of the repository under the same path."""
        target = where / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
        self.written.add(target)

    def link(self, page: str, image: str, label: str, target: str) -> str:
        """One Markdown link of `page`, a path of the repository, as the site has it."""
        address, _, anchor = target.partition("#")
        if not address or re.match(r"[a-z]+:", target) or address.startswith("/"):
            return f"{image}[{label}]({target})"
        path = os.path.normpath(os.path.join(os.path.dirname(page), address))
        here = os.path.dirname(self.pages.get(page, page))
        if path in self.pages:
            there = os.path.relpath(self.pages[path], here or ".")
            return f"[{label}]({there}{'#' + anchor if anchor else ''})"
        if not (ROOT / path).is_file():  # a folder; or nothing, which the test finds
            return label if (ROOT / path).is_dir() else f"{image}[{label}]({target})"
        there = os.path.relpath(path, here or ".")
        if image:
            self.copy(path, self.source)
            return f"![{label}]({there})"
        self.copy(path, self.extra)
        return f'<a href="{there}">{label}</a>'

    def links(self, page: str, text: str) -> str:
        """All Markdown links outside fenced blocks, and notebooks in HTML links."""
        parts = re.split(r"(^```.*?^```)", text, flags=re.M | re.S)
        for i in range(0, len(parts), 2):
            parts[i] = LINK.sub(lambda m: self.link(page, *m.groups()), parts[i])
        text = "".join(parts)
        return re.sub(r'(href="(?![a-z]+:)[^"#]+)\.ipynb', r"\1.html", text)

    def markdown(self, page: str) -> None:
        """A Markdown page of the repository."""
        self.text(self.pages[page], self.links(page, (ROOT / page).read_text()))

    def notebook(self, page: str) -> None:
        """A notebook: directives of nbdev become classes, cells of code get an anchor."""
        book = json.loads((ROOT / page).read_text())
        cells = []
        for cell in book["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = self.links(page, "".join(cell["source"]))
                cells.append(cell)
            elif cell["cell_type"] == "code" and code_cell(cell):
                if "exported" in cell["metadata"]["tags"]:
                    cells.append(anchor(f"cell-{cell['id']}"))
                self.outputs(page, cell)
                cells.append(cell)
        book["cells"] = cells
        info = {"name": "python", "pygments_lexer": "ipython3"}
        book["metadata"].setdefault("language_info", info)
        self.text(page, json.dumps(book, ensure_ascii=False))

    def outputs(self, page: str, cell: dict) -> None:
        """Links in what a cell displayed."""
        for output in cell["outputs"]:
            for kind in {"text/html", "text/markdown"} & set(output.get("data", {})):
                text = "".join(output["data"][kind])
                output["data"][kind] = self.links(page, text)

    def forget_the_rest(self) -> None:
        """Delete what an earlier build left and this one did not write."""
        for folder in (self.source, self.extra):
            for path in sorted(folder.rglob("*"), reverse=True):
                if path.is_file() and path not in self.written:
                    path.unlink()


def code_cell(cell: dict) -> bool:
    """Take nbdev's directives off a cell and tag it; False where nothing is left."""
    lines = "".join(cell["source"]).splitlines(keepends=True)
    directives = [line.split() for line in lines if line.startswith("#|")]
    words = {line[1] for line in directives if len(line) > 1}
    tags = cell["metadata"].setdefault("tags", [])
    if "export" in words:
        tags.append("exported")
    if cell["metadata"].get("jupyter", {}).get("source_hidden") or "hide_input" in words:
        tags.append("hide-input")
    cell["source"] = "".join(x for x in lines if not x.startswith("#|")).strip("\n")
    return bool(cell["source"] or cell["outputs"])


def anchor(name: str) -> dict:
    """A cell that only names a place."""
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": f"({name})="}
