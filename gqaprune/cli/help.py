"""Write `gqaprune COMMAND --help`: the most important settings; `--help_all` lists all of them."""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from textwrap import fill

_MODEL = ("model.pretrained", "model.dtype", "model.trust_remote_code")
_PRUNED = (
    "data.calibration.corpora",
    "data.calibration.windows",
    "data.calibration.sampled_windows",
    "pruning.rate",
    "pruning.kv_rate",
    "pruning.effort",
    "pruning.allocation",
    "pruning.split",
    "pruning.granularity",
    "pruning.repair.method",
    "pruning.repair.epochs",
    "pruning.repair.distill_tokens",
)
_MEASURED = ("data.evaluation.val", "data.evaluation.test", "data.evaluation.window", "data.evaluation.tokens")
_MACHINE = (
    "trainer.accelerator",
    "trainer.devices",
    "trainer.strategy",
    "trainer.precision",
    "trainer.default_root_dir",
    "dry_run",
)
_TRAINED = (
    "model.recovery.mode",
    "model.optimizer",
    "data.training.corpora",
    "data.training.tokens",
    "data.training.batch_size",
    "pruning.scheduling",
    "trainer.max_epochs",
    "trainer.max_steps",
)
_LARGE = ("pruning.offload", "pruning.sharded")
_WRITTEN = ("export.folder", "export.format", "export.quantization")

MATTERS: Mapping[str, Sequence[str]] = {
    "fit": (*_MODEL, *_PRUNED, *_TRAINED, *_MEASURED, *_WRITTEN, *_MACHINE),
    "prune": (*_MODEL, *_PRUNED, *_LARGE, *_MEASURED, *_WRITTEN, *_MACHINE),
    "search": (
        *_MODEL,
        "search.coarse_step",
        "search.fine_step",
        "search.folder",
        *_PRUNED,
        "data.evaluation.val",
        *_MACHINE,
    ),
    "sweep": (*_MODEL, "sweep.rates", "sweep.folder", "sweep.export", *_PRUNED, *_MEASURED, *_MACHINE),
    "validate": (*_MODEL, *_MEASURED, "data.bos", *_MACHINE),
    "test": (*_MODEL, *_MEASURED, "data.bos", *_MACHINE),
    "predict": (*_MODEL, "model.max_new_tokens", "model.recovery.teacher", "data.prompts", "data.chat", *_MACHINE),
}
"""Command -> settings that most runs change, in the order of the work."""

TRAINING = ("model.optimizer", "model.schedule", "model.warmup_steps", "model.compile", "data.training", "samples")
"""Beginnings of settings that have no effect without training."""

WITHOUT_TRAINING = ("prune", "search", "sweep", "validate", "test", "predict")

_GROUPS = {"model": "Model", "data": "Text", "pruning": "Pruning", "export": "Checkpoint", "trainer": "Machine"}


def hide_training(parser: argparse.ArgumentParser) -> None:
    """Leave settings that only training uses out of a command's help."""
    for action in parser._actions:
        if any(action.dest == name or action.dest.startswith(f"{name}.") for name in TRAINING):
            action.help = argparse.SUPPRESS


def describe_settings(parser: argparse.ArgumentParser, command: str, description: str) -> str:
    """Describe a command's most important settings by group, each with its default.

    Args:
        parser: parser of the command.
        command: name of the command.
        description: sentence that says what the command does.
    """
    width = min(shutil.get_terminal_size((100, 20)).columns, 100)
    actions = {action.dest: action for action in parser._actions}
    lines = [f"Usage: gqaprune {command} [--config FILE] [--SETTING VALUE ...]", "", fill(description, width)]
    group = ""
    for name in (one for one in MATTERS[command] if one in actions):  # modules of other classes lack ours
        title = _GROUPS.get(name.partition(".")[0], command.capitalize())
        if title != group:
            lines += ["", f"{title}:"]
            group = title
        lines += [f"  --{name}", *_describe(actions[name], width)]
    lines += [
        "",
        f"gqaprune {command} --help_all lists all {_count(parser):,} settings; docs/settings.md explains them.",
    ]
    return "\n".join(lines) + "\n"


def _describe(action: argparse.Action, width: int) -> list[str]:
    text = " ".join((action.help or "").replace("%%", "%").split()).partition(" (type:")[0]
    default = action.default
    if action.required:
        text += " (required)"
    elif default is not None and default != argparse.SUPPRESS and not callable(default) and len(str(default)) < 60:
        text += f" (default: {default})"
    return fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6).splitlines()


def _count(parser: argparse.ArgumentParser) -> int:
    return sum(bool(action.option_strings) and action.help != argparse.SUPPRESS for action in parser._actions)
