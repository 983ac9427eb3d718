"""The core stands without Lightning; the plan stands without the rest."""

import ast
import importlib
import inspect
import subprocess
import sys

import pytest

SCRIPT = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import {module}
"""


@pytest.mark.parametrize(
    "module",
    [
        "gqaprune",
        "gqaprune.pipeline",
        "gqaprune.report",
        "gqaprune.checkpoint",
        "gqaprune.tools.compare",
        "gqaprune.tools.search",
    ],
)
def test_core_imports_without_lightning(module: str) -> None:
    blocked = ["lightning", "lightning.pytorch", "pytorch_lightning"]
    subprocess.run([sys.executable, "-c", SCRIPT.format(blocked=blocked, module=module)], check=True)


@pytest.mark.parametrize(
    ("module", "siblings"), [("plan", {"gqaprune.replace"}), ("replace", {"gqaprune.processes"}), ("processes", set())]
)
def test_the_plan_needs_files_and_nothing_else(module: str, siblings: set[str]) -> None:
    tree = ast.parse(inspect.getsource(importlib.import_module(f"gqaprune.{module}")))
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name.startswith("gqaprune")} == siblings
