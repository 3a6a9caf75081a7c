"""Run every notebook and keep its outputs: python tests/run_notebooks.py [NAME ...]."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


def main(names: list[str]) -> None:
    """Execute the named notebooks under nbs/, or all of them, in place."""
    paths = [ROOT / "nbs" / f"{name}.ipynb" for name in names]
    for path in paths or sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        print(path.relative_to(ROOT), flush=True)
        book = nbformat.read(path, as_version=4)
        where = {"metadata": {"path": str(path.parent)}}
        NotebookClient(book, timeout=None, resources=where).execute()
        for cell in book.cells:
            cell.metadata.pop("execution", None)
        nbformat.write(book, path)


if __name__ == "__main__":
    main(sys.argv[1:])
