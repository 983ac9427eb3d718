"""Parse command-line arguments into settings: descriptions of commands and settings, spelling, parsers."""

import logging
import warnings
from argparse import HelpFormatter
from collections.abc import Callable, Mapping
from dataclasses import fields
from inspect import Parameter, signature
from itertools import zip_longest
from typing import Any, NoReturn

import transformers
from lightning.pytorch.cli import LightningArgumentParser

from gqaprune.checkpoints.formats import describe_formats
from gqaprune.cli.help import MATTERS, WITHOUT_TRAINING, describe_settings, hide_training
from gqaprune.cli.overview import DESCRIPTIONS
from gqaprune.cli.wording import explain
from gqaprune.commands.compare import compare
from gqaprune.commands.export import export
from gqaprune.commands.inspect import inspect
from gqaprune.commands.search import SearchSettings
from gqaprune.commands.sweep import SweepSettings
from gqaprune.common.paths import expand_path
from gqaprune.planning.allocation import describe_allocations

VERBOSE: Mapping[str, Any] = {
    "action": "store_true",
    "help": "also show the messages of Lightning and transformers",
}
"""The setting of every command that shows messages hidden by default."""

DRY_RUN: Mapping[str, Any] = {
    "action": "store_true",
    "help": "only print the sizes after pruning, the memory and the stages of the run with their approximate time; "
    "compute and write nothing",
}
"""The setting of every command with a trainer."""

HELP: Mapping[str, Callable[[], str]] = {
    "export.format": describe_formats,
    "format": describe_formats,
    "pruning.allocation": describe_allocations,
}
"""Settings whose values are listed in a registry: setting -> function that writes its help."""

SETTINGS: Mapping[str, type] = {"search": SearchSettings, "sweep": SweepSettings}
"""gqaprune's commands with a group of settings of the same name: name -> class of the group."""

TOOLS: Mapping[str, Callable[..., None]] = {"compare": compare, "export": export, "inspect": inspect}
"""Commands that need no trainer: name -> function, whose arguments are the command's."""


class PruningArgumentParser(LightningArgumentParser):
    """Reports a wrong argument in one sentence, like every other error.

    Attributes:
        shows_all: whether `--help` lists all settings of a command, some hundred.
    """

    shows_all = False

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        """Describe the command's most important settings, or all of them if `shows_all` is set."""
        command = self._command
        if self.shows_all or command not in MATTERS:
            if command in WITHOUT_TRAINING:
                hide_training(self)
            return str(super().format_help(formatter))
        return describe_settings(self, command, DESCRIPTIONS[command])

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an error instead of printing the usage of some hundred arguments."""
        command = self.prog.replace(" [options]", "")
        parsers = (
            [self] if self._subcommands_action is None else list(self._subcommands_action._name_parser_map.values())
        )
        names = {action.dest for parser in parsers for action in parser._actions if action.option_strings}
        reason = explain(message, names)
        end = "" if reason.endswith("?") else f"; `{command} --help` lists the settings"
        raise ValueError(reason + end) from ex

    @property
    def _command(self) -> str:
        return self.prog.replace(" [options]", "").rpartition(" ")[2]


def run_tool(name: str, arguments: list[str]) -> None:
    """Run a command that needs no trainer."""
    parser = make_tool_parser(TOOLS[name], f"gqaprune {name}")
    parser.description = DESCRIPTIONS[name]
    settings = parser.parse_args(arguments)
    set_verbosity(settings.pop("verbose"))
    TOOLS[name](**{key: _expand(value) for key, value in parser.instantiate_classes(settings).as_dict().items()})


def _expand(value: Any) -> Any:
    """Expand the paths in a tool's setting; its strings are names and paths."""
    if isinstance(value, list):
        return [_expand(one) for one in value]
    return expand_path(value) if isinstance(value, str) else value


def make_tool_parser(tool: Callable[..., None], prog: str | None = None) -> PruningArgumentParser:
    """Make the parser of a command that needs no trainer, from its function's arguments."""
    parser = PruningArgumentParser(prog=prog)
    required = [one for one in signature(tool).parameters.values() if one.default is Parameter.empty]
    several: set[str | int] = {one.name for one in required if one.annotation == list[str]}
    for name in several:  # added here because jsonargparse would want a list as one argument, in brackets
        parser.add_argument(str(name), nargs="+", type=str, help="folders, .gguf files or hub names")
    parser.add_argument("--verbose", **VERBOSE)
    parser.add_function_arguments(tool, as_positional=len(required) == 1, skip=several)  # such as `inspect MODEL`
    fill_help(parser)
    return parser


def fill_help(parser: LightningArgumentParser) -> None:
    """Replace the help of settings whose values are listed in a registry."""
    for action in parser._actions:
        if action.dest in HELP:
            action.help = HELP[action.dest]()


def spell_out(arguments: list[str]) -> list[str]:
    """Rewrite arguments, as people type them, in the form that parsers expect.

    Options may have hyphens instead of underscores, switches of commands without a trainer need no value, and `sweep`
    accepts its settings without their group, and rates as a list with commas. In paths of configurations, `~` and
    environment variables are expanded.
    """
    ungrouped = {f"--{one.name}" for one in fields(SweepSettings)} if arguments[:1] == ["sweep"] else set()
    tool = TOOLS.get(arguments[0]) if arguments else None
    known = signature(tool).parameters.values() if tool is not None else ()
    switches = {f"--{one.name}" for one in known if one.annotation is bool}
    spelled: list[str] = []
    if any(argument.replace("-", "_") == "__help_all" for argument in arguments):
        PruningArgumentParser.shows_all = True
        arguments = ["--help" if one.replace("-", "_") == "__help_all" else one for one in arguments]
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        option, equals, value = argument.partition("=")
        if option.startswith("--"):
            option = "--" + option[2:].replace("-", "_")
            option = f"--sweep.{option[2:]}" if option in ungrouped else option
        if option == "--config" and equals:
            value = expand_path(value)
        elif spelled[-1:] == ["--config"]:
            option = expand_path(argument)
            equals = value = ""
        if option in switches and not equals and following.lower() not in ("true", "false"):
            equals, value = "=", "true"
        spelled.append(option + equals + value)
    for index, argument in enumerate(spelled):  # the parser expects brackets around a list
        option, equals, value = argument.partition("=")
        if option == "--sweep.rates" and equals and not value.startswith("["):
            spelled[index] = f"{option}=[{value}]"
        elif spelled[index - 1] == "--sweep.rates" and index and not argument.startswith(("[", "--")):
            spelled[index] = f"[{argument}]"
    return spelled


def set_verbosity(is_verbose: bool) -> None:
    """Show messages of Lightning and transformers, or only their warnings."""
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO if is_verbose else logging.WARNING)
    if is_verbose:
        transformers.logging.set_verbosity_info()
        transformers.logging.enable_progress_bar()
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    warnings.filterwarnings("ignore", message=r".*self\.log\('ppl/.*sync_dist=True.*")  # it is already summed
