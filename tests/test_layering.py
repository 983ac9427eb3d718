"""The core stands without Lightning; the plan stands without the rest."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import gqaprune

OF_LIGHTNING = ("accumulation", "module", "callbacks", "datamodules", "cli", "__main__")

SCRIPT = """
import importlib
import sys
for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
    sys.modules[name] = None
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def list_core() -> list[str]:
    modules = [module.name for module in pkgutil.walk_packages(gqaprune.__path__, "gqaprune.")]
    return [name for name in modules if name.split(".")[1] not in OF_LIGHTNING]


def test_core_imports_without_lightning() -> None:
    core = list_core()
    assert {"gqaprune.pipeline", "gqaprune.checkpoints.save", "gqaprune.commands.compare"} < set(core)
    done = subprocess.run([sys.executable, "-c", SCRIPT, *core], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "siblings"),
    [("plan", {"gqaprune.common.atomic_files"}), ("replace", {"gqaprune.common.processes"}), ("processes", set())],
)
def test_the_plan_needs_files_and_nothing_else(module: str, siblings: set[str]) -> None:
    tree = ast.parse(inspect.getsource(importlib.import_module(f"gqaprune.{module}")))
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name.startswith("gqaprune")} == siblings
