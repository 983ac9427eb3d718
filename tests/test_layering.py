"""The core stands without Lightning; the plan stands without the rest."""

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
    "module", ["gqaprune", "gqaprune.pipeline", "gqaprune.report", "gqaprune.checkpoint", "gqaprune.tools.search"]
)
def test_core_imports_without_lightning(module: str) -> None:
    blocked = ["lightning", "lightning.pytorch", "pytorch_lightning"]
    subprocess.run([sys.executable, "-c", SCRIPT.format(blocked=blocked, module=module)], check=True)


def test_plan_imports_no_sibling() -> None:
    import ast
    import inspect

    import gqaprune.plan

    tree = ast.parse(inspect.getsource(gqaprune.plan))
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in imported if name.startswith("gqaprune")}
