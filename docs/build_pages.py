"""Put the site's pages together: python docs/build_pages.py. Sphinx then reads them.

Notebooks and hand-written pages are staged (stage.py); the table of contents, the API
reference, the paper's map, the figures and the errors are generated (pages.py).
"""

import shutil
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import pages  # noqa: E402
from conf import MATHJAX, MATHJAX_FILES  # noqa: E402
from stage import ROOT, Stage, notebooks  # noqa: E402

BUILD = ROOT / "docs" / "_build"


def sections() -> list[dict]:
    """The sections of toc.toml, their patterns replaced by pages."""
    table = tomllib.loads((ROOT / "docs" / "toc.toml").read_text())["section"]
    names, generated = notebooks(), {"figures", "paper_map", "errors"}
    optional = {"CONTRIBUTING", "CHANGELOG"}
    literal = {page for section in table for page in section["pages"] if "*" not in page}
    taken: set[str] = set()
    for section in table:
        listed = []
        for pattern in section["pages"]:
            matching = [n for n in names if fnmatch(n, pattern) and n not in taken]
            if "*" in pattern:  # a deeper folder has a pattern of its own
                depth = pattern.count("/")
                matching = [n for n in matching if n.count("/") == depth]
                matching = [n for n in matching if n not in literal]
            elif not matching:
                known = pattern in generated or page_exists(pattern)
                if not known and pattern not in optional:
                    sys.exit(f"docs/toc.toml lists {pattern}: there is no such page.")
                matching = [pattern] if known else []
            listed += matching
            taken |= set(matching)
        section["pages"] = listed
    if missing := sorted(set(names) - taken):
        sys.exit(f"docs/toc.toml lists no place for {', '.join(missing)}: add it there.")
    return table


def page_exists(name: str) -> bool:
    """Whether there is a hand-written page of this name."""
    return any((ROOT / folder / f"{name}.md").exists() for folder in ("", "docs"))


def mathjax(stage: Stage) -> None:
    """Copy of MathJax what pages of this site load."""
    for name in MATHJAX_FILES:
        target = stage.extra / "_static" / "mathjax" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (MATHJAX / name).is_dir() else shutil.copy2
        if not target.exists():
            copy(MATHJAX / name, target)
        stage.written |= {target, *target.rglob("*")}


def main() -> None:
    """Write everything that Sphinx reads under docs/_build."""
    stage = Stage(BUILD)
    stage.pages |= {f"docs/{name}.md": f"{name}.md" for name in pages.GENERATED}
    for page in list(stage.pages):
        if page.endswith(".ipynb"):
            stage.notebook(page)
        elif (ROOT / page).exists() and page != "docs/index.md":
            stage.markdown(page)
    for name, make in pages.GENERATED.items():
        stage.text(f"{name}.md", stage.links(f"docs/{name}.md", make()))
    for module, text in pages.api().items():
        stage.text(f"api/{module}.md", text)
    table = sections()
    for section in table:
        stage.text(f"{section['page']}.md", pages.section(stage.source, section))
    front = pages.front(table, (ROOT / "docs" / "index.md").read_text())
    stage.text("index.md", stage.links("docs/index.md", front))
    for path in sorted((ROOT / "figures").iterdir()):
        stage.copy(f"figures/{path.name}", stage.extra)
    mathjax(stage)
    stage.forget_the_rest()


if __name__ == "__main__":
    main()
