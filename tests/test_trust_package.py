"""The package outside its checkout, and what it stands on."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.long_package import NAMELESS, build_wheel, import_from, install, licence, licences

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_a_wheel_holds_the_modules_and_nothing_else(wheel):
    names = ZipFile(wheel).namelist()
    ours = [p.relative_to(ROOT).as_posix() for p in (ROOT / "afen").rglob("*.py")]
    held = [name for name in names if ".dist-info/" not in name]
    assert sorted(held) == sorted(ours)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_a_wheel_is_imported_elsewhere(wheel, tmp_path):
    folder = install(wheel, tmp_path / "target")
    assert import_from(folder, tmp_path).is_relative_to(folder)


def test_what_is_installed_fits_together():
    command = [sys.executable, "-m", "pip", "check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "No broken requirements found.\n")


def test_every_package_at_run_time_names_its_licence():
    every = licences()
    assert {"afen", "torch", "numpy", "papermill"} <= set(every) and len(every) > 60
    assert {name for name, words in every.items() if not words} <= NAMELESS


def test_a_package_without_a_licence_would_be_noticed():
    about = metadata.metadata("afen")
    for name in ("License-Expression", "License", "Classifier"):
        del about[name]
    assert licence(about) == ""


def test_two_versions_of_python_run_make_test():
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    versions = re.search(r"python: \[(.*)\]", text)[1].replace('"', "").split(", ")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(versions) == 2 and "run: make test\n" in text
    assert project["requires-python"] == f">={versions[0]}"
