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
    patterns = [pattern for part in table for pattern in part["pages"]]
    taken: dict[str, list[str]] = {pattern: [] for pattern in patterns}
    homeless = []
    for name in notebooks():
        fit = [p for p in patterns if fnmatch(name, p) and p.count("/") == name.count("/")]
        taken[max(fit, key=len)].append(name) if fit else homeless.append(name)
    if homeless:
        sys.exit(f"docs/toc.toml has no place for {', '.join(homeless)}: add one there.")
    for part in table:
        part["pages"] = [n for p in part["pages"] for n in taken[p] or hand_written(p)]
    return table


OPTIONAL = {"CONTRIBUTING", "CHANGELOG"}


def hand_written(pattern: str) -> list[str]:
    """The page that is no notebook; nothing for a pattern that may match nothing."""
    if pattern in pages.GENERATED or page_exists(pattern):
        return [pattern]
    if "*" not in pattern and pattern not in OPTIONAL:
        sys.exit(f"docs/toc.toml lists {pattern}: there is no such page.")
    return []


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
