"""Pages of settings, from the signatures and docstrings that the command line has its help from."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from inspect import Parameter, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch
from docstring_parser import parse

from gqaprune.callbacks import CheckpointExport, PerplexityGuard, TaylorPruning
from gqaprune.cli.arguments import HELP, TOOLS
from gqaprune.cli.overview import DESCRIPTIONS
from gqaprune.commands.search import SearchSettings
from gqaprune.commands.sweep import SweepSettings
from gqaprune.datamodules import TextDataModule
from gqaprune.module import CausalLMModule
from gqaprune.planning.config import PruningConfig

GROUPS: Mapping[str, type] = {
    "model": CausalLMModule,
    "data": TextDataModule,
    "pruning": TaylorPruning,
    "export": CheckpointExport,
    "guard": PerplexityGuard,
    "search": SearchSettings,
    "sweep": SweepSettings,
}
"""First part of a setting's name -> the class whose arguments follow it."""
ANY_SETTINGS: Mapping[type, type] = {TaylorPruning: PruningConfig}
"""Class that passes on any other settings -> the dataclass that has them."""
FOR_PYTHON = ("data.tokenizer", "data.trust_remote_code", "pruning.calibration")
"""Arguments that the command line sets by itself, or has no words for."""


@dataclass(frozen=True)
class Setting:
    """One setting as a reader needs it.

    Args:
        name: full name, as on the command line.
        type: what it takes, in words of YAML.
        default: what it is when nothing is said; empty where it is needed.
        description: the docstring's, with bounds and units.
    """

    name: str
    type: str
    default: str
    description: str


def list_settings(owner: Callable[..., Any], prefix: str = "") -> Iterator[Setting]:
    """List the settings that a class or function takes, those of its groups in the place of the group.

    Args:
        owner: what takes them.
        prefix: what their names begin with, with the dot.

    Raises:
        ValueError: if one is not described.
    """
    made = owner() if is_dataclass(owner) else None  # its defaults may come from factories
    described = {one.arg_name: one.description for one in parse(owner.__doc__ or "").params}
    for parameter in signature(owner).parameters.values():
        name = prefix + parameter.name
        value = getattr(made, parameter.name, parameter.default)
        if parameter.kind is Parameter.VAR_KEYWORD:
            yield from list_settings(ANY_SETTINGS[owner], prefix)  # type: ignore[index]
        elif name in FOR_PYTHON:
            continue
        elif is_dataclass(value):
            yield from list_settings(type(value), f"{name}.")
        else:
            description = HELP[name]() if name in HELP else described.get(parameter.name)
            if not description:
                raise ValueError(f"{name} is not described: {owner.__name__}'s docstring needs it under Args")
            default = "" if value is Parameter.empty else format_default(value)
            yield Setting(name, describe_type(parameter.annotation), default, " ".join(description.split()))


def list_names() -> Iterator[str]:
    """List the full names of all settings that begin with a group."""
    for name, owner in GROUPS.items():
        yield from (setting.name for setting in list_settings(owner, f"{name}."))


def describe_type(annotation: Any) -> str:
    """Say what a setting takes, as YAML calls it."""
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(dict.fromkeys(describe_type(option) for option in get_args(annotation)))
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{option}`" for option in get_args(annotation))
    if get_origin(annotation) is Callable:
        return "class with its arguments"
    names = {NoneType: "`null`", bool: "`true` or `false`", int: "whole number", float: "number", str: "text"}
    if annotation in names:
        return names[annotation]
    arguments = [describe_type(one) for one in get_args(annotation) if one is not Ellipsis]
    if get_origin(annotation) is list or (get_origin(annotation) is tuple and Ellipsis in get_args(annotation)):
        return f"list of {_make_plural(arguments[0])}"
    if get_origin(annotation) is tuple:
        return f"list of {len(arguments)} {_make_plural(arguments[0])}"
    if get_origin(annotation) is dict:
        return f"mapping of {_make_plural(arguments[0])} to {_make_plural(arguments[1])}"
    return str(getattr(annotation, "__name__", annotation))


def _make_plural(name: str) -> str:
    return name if name in ("text", "Any") or name.startswith("list") else f"{name}s"


def format_default(value: Any) -> str:
    """Write a default as YAML has it; an optimizer by what it is built with."""
    if callable(value) and not isinstance(value, type):
        optimizer = value([torch.nn.Parameter(torch.zeros(1))])
        rates = (f"{name}: {optimizer.defaults[name]:g}" for name in ("lr", "weight_decay"))
        return f"{type(optimizer).__name__} ({', '.join(rates)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {format_default(one)}" for key, one in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def write_settings(folder: Path) -> None:
    """Write a page for each group of settings, and one for each command that needs no trainer."""
    folder.mkdir(parents=True)
    for name, owner in GROUPS.items():
        introduction = read_introduction(owner)
        write_page(folder / f"{name}.md", name, introduction, list_settings(owner, f"{name}."))
    for name, tool in TOOLS.items():
        write_page(folder / f"{name}_command.md", f"gqaprune {name}", DESCRIPTIONS[name], list_settings(tool))


def read_introduction(owner: type) -> str:
    """The docstring's first sentence."""
    return parse(owner.__doc__ or "").short_description or ""


def write_page(path: Path, title: str, introduction: str, settings: Iterator[Setting]) -> None:
    """Write one page: a definition for every setting, a heading for every group, whose settings come last."""
    lines = [f"# {title}", "", introduction, ""]
    group = title
    for setting in sorted(settings, key=lambda one: one.name.count(".")):
        own = setting.name.rpartition(".")[0] or title
        if own != group:
            group = own
            lines += [f"## {group}", ""]
        default = f"default `{setting.default}`" if setting.default else "needed"
        lines += [f"`{setting.name}`{{#{make_anchor(setting.name)}}}", f": {setting.type}; {default}", ""]
        lines += [f"  {escape_prose(setting.description[0].upper() + setting.description[1:])}", ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def make_anchor(name: str) -> str:
    """Name the anchor of a setting on its page."""
    return re.sub(r"[._]", "-", name)


def escape_prose(text: str) -> str:
    """Escape what Markdown reads as markup, outside of code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([<*\[\]|_])", r"\\\1", part) for part in parts)
