"""Find modules and data modules of other projects that the command line or a configuration file names."""

import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningDataModule

from gqaprune.common.errors import first_line
from gqaprune.module import CausalLMModule

PARTS = ("model", "data")
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def find_named_classes(arguments: Sequence[str]) -> dict[str, type]:
    """Import the classes that `--model`, `--data` or `class_path` in a configuration name, also from this folder.

    A module that is named without any setting of the data may bring its own text, so that its data module is any
    LightningDataModule or none.

    Args:
        arguments: arguments of the command line, after the command.

    Raises:
        ValueError: if a class does not exist.
    """
    names: dict[str, str] = {}
    has_data = False
    for option, value in _list_options(arguments):
        has_data |= option.startswith("--data")
        if option == "--config" and Path(value).is_file():
            settings = _read_settings(Path(value))
            names |= _read_names(settings)
            has_data |= "data" in settings
        for part in PARTS:
            if option in (f"--{part}", f"--{part}.class_path") and _NAME.fullmatch(value):
                names[part] = value
    named = {part: _import_class(name) for part, name in names.items()}
    is_alone = "model" in named and not has_data and not issubclass(named["model"], CausalLMModule)
    return named | {"data": LightningDataModule} if is_alone else named


def _list_options(arguments: Sequence[str]) -> list[tuple[str, str]]:
    options = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        option, equals, value = argument.partition("=")
        if option.startswith("--"):
            options.append((option, value if equals else following))
    return options


def _read_settings(path: Path) -> Mapping[str, Any]:
    try:
        settings: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # the parser will raise the error
    return settings if isinstance(settings, Mapping) else {}


def _read_names(settings: Mapping[str, Any]) -> dict[str, str]:
    groups = {part: settings.get(part) for part in PARTS}
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
