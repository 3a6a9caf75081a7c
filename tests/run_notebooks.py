"""Run every notebook and keep its outputs: python tests/run_notebooks.py [NAME ...].

Each code cell keeps a hash of the source that was run, so that a test finds outputs of
other code.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
STYLED = re.compile(r"\bT_[0-9a-f]{5}(?=[_\"])")  # pandas draws a styled table's name
TEMPORARY = re.compile(rf"{re.escape(tempfile.gettempdir())}/tmp\w+")


def run(path: Path) -> nbformat.NotebookNode:
    """The executed notebook. `train` goes through papermill, as its readers run it."""
    if path.stem == "train":
        output = ROOT / "runs" / "demo.ipynb"
        output.parent.mkdir(exist_ok=True)
        papermill = Path(sys.executable).with_name("papermill")
        subprocess.run([papermill, path, output], check=True, cwd=ROOT)
        return nbformat.read(output, as_version=4)
    book = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    return NotebookClient(book, timeout=None, resources=where).execute()


def source_hash(source: str) -> str:
    """Eight digits that change with a cell's source."""
    return hashlib.blake2b(source.encode(), digest_size=4).hexdigest()


def settle(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop timings, and what a progress bar overwrote; note what was run."""
    book.metadata = {"kernelspec": book.metadata["kernelspec"]}
    for cell in book.cells:
        kept = {k: cell.metadata[k] for k in ("tags", "jupyter") if k in cell.metadata}
        if cell.cell_type == "code":
            kept["source_hash"] = source_hash(cell.source)
            cell.outputs = merge(cell.outputs)
            for i, output in enumerate(cell.outputs):
                if html := output.get("data", {}).get("text/html"):
                    name = f"T_{kept['source_hash']}_{i}"
                    output.data["text/html"] = STYLED.sub(name, html)
        cell.metadata = kept
    return book


def merge(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Join what one stream wrote in pieces; of a line, keep what was seen last.

    The name of a temporary folder differs each time, and is left out.
    """
    merged: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type != "stream":
            merged.append(output)
        elif merged and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    for output in merged:
        if output.output_type == "stream":
            lines = TEMPORARY.sub("...", output.text).rstrip("\n").split("\n")
            output.text = "\n".join(x.rsplit("\r", 1)[-1] for x in lines) + "\n"
    return merged


def main(names: list[str]) -> None:
    """Execute the named notebooks under nbs/, or all of them, in place."""
    paths = [ROOT / "nbs" / f"{name}.ipynb" for name in names]
    for path in paths or sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            print(path.relative_to(ROOT), flush=True)
            nbformat.write(settle(run(path)), path)


if __name__ == "__main__":
    main(sys.argv[1:])
