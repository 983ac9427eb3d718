"""The wings keep their order, and the owner's folders at the root are the package's own, seen once."""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKS = ("callbacks", "datamodules")
BIN = Path(sys.executable).parent


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """A copy of what a package is built and linted from, links included."""
    for name in ("gqaprune", "cli.py", "pyproject.toml", "README.md", "LICENSE", *LINKS):
        if (ROOT / name).is_dir() and name not in LINKS:
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name, follow_symlinks=False)
    return tmp_path


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [str(BIN / "lint-imports"), "--no-cache"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("wing", sorted(path.parent.name for path in (ROOT / "gqaprune").glob("*/__init__.py")))
def test_wing_says_what_it_is_for_and_what_it_may_import(wing: str) -> None:
    documentation = importlib.import_module(f"gqaprune.{wing}").__doc__ or ""
    assert len(documentation.splitlines()[0]) > 40 and "\n\n" in documentation
    assert "May import" in documentation


@pytest.mark.parametrize("link", LINKS)
def test_link_at_the_root_leads_into_the_package(link: str) -> None:
    assert os.readlink(ROOT / link) == f"gqaprune/{link}"
    assert (ROOT / link).resolve() == ROOT / "gqaprune" / link


def test_linters_see_linked_files_once() -> None:
    shown = subprocess.run([str(BIN / "ruff"), "check", "--show-files"], cwd=ROOT, capture_output=True, text=True)
    files = shown.stdout.split()
    assert str(ROOT / "gqaprune/callbacks/guard.py") in files
    assert not [file for file in files for link in LINKS if file.startswith(str(ROOT / link))]


def test_wheel_and_sdist_claim_one_name(copied_package: Path) -> None:
    build = "import setuptools.build_meta as b; print(b.build_wheel('dist'), b.build_sdist('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=copied_package, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = (list((copied_package / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"gqaprune"}
    assert "gqaprune/callbacks/guard.py" in names
    templates = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("gqaprune/*/templates/*")}
    assert {"gqaprune/reporting/templates/page.css", "gqaprune/checkpoints/templates/card.md"} <= templates
    assert templates <= set(names)
    with tarfile.open(sdist) as archive:
        inside = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    assert "gqaprune/callbacks/guard.py" in inside and templates <= set(inside)
    assert not [name for name in inside if name.split("/")[0] in LINKS]


def test_wings_keep_their_order(copied_package: Path) -> None:
    done = lint_imports(copied_package)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "added"),
    [
        ("models/losses.py", "from gqaprune.placement.fsdp import shard_model"),
        ("common/errors.py", "from gqaprune.plan import BlockKey"),
        ("scoring/outliers.py", "from gqaprune.planning.config import PruningConfig"),
        ("planning/config.py", "import lightning"),
    ],
)
def test_import_against_the_order_is_refused(file: str, added: str, copied_package: Path) -> None:
    path = copied_package / "gqaprune" / file
    path.write_text(f"{path.read_text()}\n\ndef sneak() -> None:\n    {added}\n")
    done = lint_imports(copied_package)
    assert done.returncode == 1
    assert "BROKEN" in done.stdout


def test_core_runs_without_lightning(copied_package: Path) -> None:
    script = "import sys; sys.modules['lightning'] = None; import gqaprune, gqaprune.commands.compare"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
