"""The package on its own: a wheel, an empty environment, nbdev 3, licences."""

import filecmp
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
IMPORT_ALL = """
import importlib, pkgutil, afen, afen.methods
for package in (afen, afen.methods):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
print(afen.__file__)
"""
NAMELESS = {"cuda-toolkit"}  # NVIDIA's name for a list of packages, without files or licence
SEEN = {**os.environ, "PYTHONPATH": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(*words, cwd):
    """A command's output; AssertionError with its last words if it fails."""
    words = [str(word) for word in words]
    done = subprocess.run(words, cwd=cwd, env=SEEN, capture_output=True, text=True)
    assert done.returncode == 0, f"{words[:4]}: {(done.stdout + done.stderr)[-600:]}"
    return done.stdout.strip()


def build_wheel(folder):
    """Build the wheel from a copy, so that nothing is left in the checkout."""
    copy = folder / "source"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "afen", copy / "afen", ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", folder, copy, cwd=folder)
    return next(folder.glob("afen-*.whl"))


def install(wheel, folder):
    """Unpack a wheel with pip, without what it needs; the folder to import from."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", folder, wheel, cwd=folder.parent)
    return folder


def import_from(folder, cwd):
    """Import every module in a folder, elsewhere than in the checkout; where afen is."""
    script = f"import sys; sys.path.insert(0, {str(folder)!r})\n{IMPORT_ALL}"
    return Path(run(sys.executable, "-W", "error::ImportWarning", "-c", script, cwd=cwd))


def empty_environment(wheel, folder):
    """Install the wheel into an environment of nothing; then lend it the packages.

    They are not fetched again (torch alone has gigabytes): a .pth file names their folder.
    Returns what pip says of the whole.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    assert run(python, "-c", "import afen; print(afen.__version__)", cwd=folder)
    place = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    lent = sysconfig.get_path("purelib")
    (Path(place) / "lent.pth").write_text(lent + "\n")
    found = Path(run(python, "-c", IMPORT_ALL, cwd=folder))
    assert found.is_relative_to(folder), found
    return run(python, "-m", "pip", "check", cwd=folder)


def nbdev_3(folder):
    """Export with nbdev 3, which reads pyproject.toml alone; the modules that differ."""
    venv.create(folder / "env", with_pip=True)
    pip = folder / "env" / "bin" / "pip"
    run(pip, "install", "--quiet", "nbdev>=3,<4", cwd=folder)
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "afen"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", folder)
    modules = [p for p in (folder / "afen").rglob("*.py") if p.name[0] != "_"]
    for path in modules:
        path.unlink()
    run(folder / "env" / "bin" / "nbdev-export", cwd=folder)
    version = run(folder / "env" / "bin" / "python", "-c",
                  "from importlib.metadata import version; print(version('nbdev'))", cwd=folder)  # fmt: skip
    ours = [ROOT / path.relative_to(folder) for path in modules]
    differ = [str(p.relative_to(folder)) for p, other in zip(modules, ours)
              if not (p.exists() and filecmp.cmp(p, other, shallow=False))]  # fmt: skip
    return version, len(modules), differ


def licences():
    """name -> licence, of all that the package needs to run, itself and at second hand."""
    waiting, known = ["afen"], {}
    while waiting:
        try:
            about = metadata.distribution(waiting.pop())
        except metadata.PackageNotFoundError:  # of another platform
            continue
        name = about.metadata["Name"]
        if name in known:
            continue
        known[name] = licence(about.metadata)
        for line in about.requires or []:
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                waiting.append(wanted.name)
    return dict(sorted(known.items(), key=lambda pair: pair[0].casefold()))


def licence(about):
    """The licence that a package's metadata name, in a line; "" if they name none."""
    if expression := about.get("License-Expression"):
        return expression
    classifiers = about.get_all("Classifier") or []
    named = [line.split(" :: ")[-1] for line in classifiers if line.startswith("License ::")]
    text = (about.get("License") or "").strip().splitlines()
    return ", ".join(named) or (text[0][:60] if text else "")


def package(folder):
    """All of it; what was tried, and what is wrong."""
    faults = []
    wheel = build_wheel(folder)
    elsewhere = import_from(install(wheel, folder / "target"), folder)
    if not elsewhere.is_relative_to(folder / "target"):
        faults.append(f"the wheel is not what is imported, but {elsewhere}")
    checked = empty_environment(wheel, folder / "empty")
    if "No broken requirements" not in checked:
        faults.append(f"pip check: {checked}")
    try:
        version, n, differ = nbdev_3(folder / "three")
    except AssertionError as error:
        version, n, differ = f"not tried: {str(error)[-200:]}", 0, []
    faults += [f"nbdev {version} exports another {name}" for name in differ]
    every = licences()
    nameless = [name for name, words in every.items() if not words and name not in NAMELESS]
    faults += [f"{name} names no licence" for name in nameless]
    return {
        "wheel": wheel.name,
        "size": wheel.stat().st_size,
        "pip_check": checked,
        "lent": "all packages but afen, from the environment of the tests",
        "nbdev": version,
        "modules": n,
        "licences": every,
        "faults": faults,
    }
