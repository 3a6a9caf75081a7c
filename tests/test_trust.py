"""Trust: what must not pass unnoticed, and what must not be lost."""

import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from afen.core import started_by

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
GIVEN = "print(sorted(injected_parameters(globals(), before, ['epochs'])), started_by())"


def little_notebook(path, *cells):
    """A notebook with a parameters cell, and then the given cells."""
    start = "from afen.core import started_by\nfrom afen.runs import injected_parameters\n"
    cells = [start + "before = set(globals())", "epochs = 1", *cells]
    book = new_notebook(cells=[new_code_cell(cell) for cell in cells], metadata=KERNEL)
    book.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(book, path)
    return book


def last_output(book):
    return book.cells[-1].outputs[-1]["text"]


def test_an_unknown_parameter_is_seen_when_python_starts_papermill(tmp_path):
    little_notebook(tmp_path / "in.ipynb", GIVEN)
    paths = tmp_path / "in.ipynb", tmp_path / "out.ipynb"
    book = papermill.execute_notebook(*paths, {"epoch": 3}, progress_bar=False)
    assert last_output(book).startswith("['epoch', 'epochs'] papermill, started by ")


def test_an_unknown_parameter_is_seen_when_python_runs_papermill_unbuffered(tmp_path):
    little_notebook(tmp_path / "in.ipynb", GIVEN)
    paths = tmp_path / "in.ipynb", tmp_path / "out.ipynb"
    command = [sys.executable, "-u", "-m", "papermill", *paths, "-p", "epoch", "3"]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    said = last_output(nbformat.read(paths[1], as_version=4))
    assert said.startswith(f"['epoch', 'epochs'] papermill {paths[0]} {paths[1]} -p epoch")


def test_a_misspelt_parameter_stops_training_that_python_starts(tmp_path):
    given = {"epoch": 3, "out": str(tmp_path / "run")}
    paths = ROOT / "nbs" / "train.ipynb", tmp_path / "out.ipynb"
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'epochs'"):
        papermill.execute_notebook(*paths, given, progress_bar=False)
    assert not (tmp_path / "run").exists()


def test_ones_own_variables_are_left_alone_in_a_live_kernel(tmp_path):
    mine = ["epoch = 3", "epochs = 1", "# Parameters of mine\nnotes = 1"]
    book = little_notebook(tmp_path / "in.ipynb", *mine, GIVEN, GIVEN)
    NotebookClient(book).execute()
    assert last_output(book).startswith("['epochs'] a kernel, started by ")


def test_a_program_is_named_without_its_options():
    assert started_by() == Path(sys.argv[0]).name
