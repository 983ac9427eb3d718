"""What the package imports is declared in pyproject.toml, and what is declared is imported."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_IMPORTED = {
    "tensorboard": "Lightning's logger needs it",
}
OPTIONAL = {
    "deepspeed": "its strategy has loaded it where it is looked at",
    "lm_eval": "extra `eval`",
    "torchao": "extra `int8`",
    "xllamacpp": "extra `llama-cpp`",
}
"""Modules that the package works without; their distributions need not be installed where this runs."""


def normalize(name: str) -> str:
    """As PEP 503 compares names of distributions."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_names(requirements: list[str]) -> set[str]:
    """Names of the distributions in a list of requirements."""
    found = [re.match(r"[A-Za-z0-9._-]+", requirement) for requirement in requirements]
    return {normalize(match[0]) for match in found if match}


def list_imports(source: str) -> set[str]:
    """Top-level modules that some code imports anywhere, but for the package's own."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"gqaprune"}


def find_distributions(modules: set[str]) -> set[str]:
    """Distributions that modules come from; a module's own name where none is installed."""
    known = packages_distributions()
    return {normalize(name) for module in modules for name in known.get(module, [module])}


imported = {module for path in (ROOT / "gqaprune").rglob("*.py") for module in list_imports(path.read_text("utf-8"))}
needed = find_distributions(imported - OPTIONAL.keys())
declared = read_names(PROJECT["dependencies"])
extras = read_names(
    [one for name, extra in PROJECT["optional-dependencies"].items() if name not in ("dev", "docs") for one in extra]
)


def test_imports_are_read_wherever_they_stand() -> None:
    source = "import os, a.b as c\nfrom . import d\ndef f():\n    from e.f import g\n    import gqaprune.plan\n"
    assert list_imports(source) == {"a", "e"}


def test_what_is_imported_is_declared() -> None:
    assert needed - declared == set()


def test_what_is_declared_is_imported_or_says_who_needs_it() -> None:
    assert declared - needed == NOT_IMPORTED.keys()
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    for name, reason in NOT_IMPORTED.items():
        assert any(
            line.lstrip().startswith(f'"{name}') and line.endswith(f"# not imported: {reason}") for line in lines
        )


def test_what_is_imported_where_it_is_there_is_an_extra() -> None:
    assert OPTIONAL.keys() <= imported
    assert extras == {normalize(name) for name in OPTIONAL} - {"deepspeed"}


def test_what_is_declared_has_a_lower_bound_and_is_pinned() -> None:
    pinned = read_names((ROOT / "constraints.txt").read_text().splitlines())
    assert declared <= pinned
    assert [one for one in PROJECT["dependencies"] if ">=" not in one] == []
