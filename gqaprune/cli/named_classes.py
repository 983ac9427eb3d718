"""Find modules and data modules of other projects that the command line or a configuration file names."""

import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from gqaprune.common.errors import first_line

PARTS = ("model", "data")
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def find_named_classes(arguments: Sequence[str]) -> dict[str, type]:
    """Import the classes that `--model`, `--data` or `class_path` in a configuration name, also from this folder.

    Args:
        arguments: arguments of the command line, after the command.

    Raises:
        ValueError: if a class does not exist.
    """
    names: dict[str, str] = {}
    for option, value in _list_options(arguments):
        if option == "--config" and Path(value).is_file():
            names |= _read_names(Path(value))
        for part in PARTS:
            if option in (f"--{part}", f"--{part}.class_path") and _NAME.fullmatch(value):
                names[part] = value
    return {part: _import_class(name) for part, name in names.items()}


def _list_options(arguments: Sequence[str]) -> list[tuple[str, str]]:
    options = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = argument.partition("=")
        if option.startswith("--"):
            options.append((option, value if equals else following))
    return options


def _read_names(path: Path) -> dict[str, str]:
    try:
        settings: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # the parser will raise the error
    groups = {part: settings.get(part) for part in PARTS} if isinstance(settings, Mapping) else {}
    named = {part: group.get("class_path") for part, group in groups.items() if isinstance(group, Mapping)}
    return {part: name for part, name in named.items() if isinstance(name, str)}


def _import_class(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # `python script.py` would search there as well
    try:
        named = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module's code can raise anything
        raise ValueError(f"{name} cannot be imported: {first_line(error)}") from error
    if not isinstance(named, type):
        raise ValueError(f"{name} must be a class, got {type(named).__name__}")
    return named
