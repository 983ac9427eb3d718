"""A page for every public name, with its docstring; what is not documented, an argument included, is an error."""

from collections.abc import Sequence
from dataclasses import is_dataclass
from importlib import import_module
from inspect import Parameter, isclass, isfunction, signature
from pathlib import Path
from typing import Any

from docstring_parser import parse

import gqaprune
from gqaprune import callbacks, datamodules

from sitegen.settings import escape_prose

CONFIGS = (
    "gqaprune.scoring.criteria.base.ScoringConfig",
    "gqaprune.planning.groups.LimitsConfig",
    "gqaprune.planning.groups.SensitivityConfig",
    "gqaprune.planning.groups.SwapsConfig",
    "gqaprune.surgery.repair_config.RepairConfig",
    "gqaprune.datamodules.config.CalibrationConfig",
    "gqaprune.datamodules.config.TrainingConfig",
    "gqaprune.datamodules.config.EvaluationConfig",
    "gqaprune.datamodules.config.SamplingConfig",
    "gqaprune.training.recovery.RecoveryConfig",
    "gqaprune.commands.search.SearchSettings",
    "gqaprune.commands.sweep.SweepSettings",
)
"""Groups of settings that the settings of others hold."""
TYPES = (
    "gqaprune.geometry.Geometry",
    "gqaprune.plan.KeptUnits",
    "gqaprune.plan.BlockKey",
    "gqaprune.reporting.report.Report",
    "gqaprune.reporting.report.Stage",
    "gqaprune.reporting.report.Outlier",
    "gqaprune.reporting.report.LayerDamage",
    "gqaprune.surgery.repair.BlockRepair",
    "gqaprune.surgery.refinement.Refinement",
    "gqaprune.surgery.distillation.Distillation",
    "gqaprune.common.stage_cache.StageCache",
    "gqaprune.common.stage_cache.StageResult",
    "gqaprune.placement.layer_store.Placement",
    "gqaprune.data.corpora.Corpus",
    "gqaprune.data.examples.Columns",
    "gqaprune.data.examples.Conversation",
    "gqaprune.data.prompts.Prompt",
    "gqaprune.training.resume.FoundRun",
)
"""What public functions take and return besides."""
SECTIONS: Sequence[tuple[str, str, Sequence[str]]] = (
    ("library", "Library", [f"gqaprune.{name}" for name in gqaprune.__all__ if name != "__version__"]),
    (
        "lightning",
        "Module and data",
        ["gqaprune.module.CausalLMModule", *(f"gqaprune.datamodules.{name}" for name in datamodules.__all__)],
    ),
    ("callbacks", "Callbacks", [f"gqaprune.callbacks.{name}" for name in callbacks.__all__]),
    ("configs", "Groups of settings", CONFIGS),
    ("types", "Types", TYPES),
)
"""Page -> heading and public names."""


def write_api(folder: Path) -> None:
    """Write a page for every name, and one for every section with the first sentence of each.

    Raises:
        ValueError: if something public is not documented.
    """
    folder.mkdir(parents=True)
    undocumented = []
    for page, heading, names in SECTIONS:
        rows = []
        for full_name in names:
            module, _, name = full_name.rpartition(".")
            value = getattr(import_module(module), name)
            undocumented += find_undocumented(full_name, value)
            (folder / f"{full_name}.rst").write_text(describe(full_name, value), encoding="utf-8")
            summary = parse(value.__doc__ or "").short_description or ""
            rows += [f"[`{name}`]({full_name}.rst)", f": {escape_prose(summary)}", ""]
        entries = [f"{name.rpartition('.')[2]} <{name}>" for name in names]
        lines = [f"# {heading}", "", *rows]
        lines += ["```{toctree}", ":hidden:", "", *entries, "```", ""]
        (folder / f"{page}.md").write_text("\n".join(lines), encoding="utf-8")
    if undocumented:
        raise ValueError(f"not documented: {', '.join(undocumented)}")


def describe(full_name: str, value: Any) -> str:
    """Write the page of one name, as reStructuredText."""
    name = full_name.rpartition(".")[2]
    lines = [name, "=" * len(name), ""]
    lines += [f".. autoclass:: {full_name}", "   :members:"] if isclass(value) else [f".. autofunction:: {full_name}"]
    return "\n".join([*lines, ""])


def find_undocumented(full_name: str, value: Any) -> list[str]:
    """List what a public name leaves unsaid: itself, its public methods, or arguments of either."""
    missing = [] if value.__doc__ else [full_name]
    missing += [f"{full_name}({name})" for name in find_unexplained(value)]
    if isclass(value):
        for name, member in vars(value).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if not name.startswith("_") and isfunction(function) and not function.__doc__:
                missing.append(f"{full_name}.{name}")
    return missing


def find_unexplained(value: Any) -> list[str]:
    """List the arguments of a function or class that its docstring leaves out."""
    if isclass(value) and not is_dataclass(value) and "__init__" not in vars(value):
        return []
    explained = {one.arg_name.lstrip("*") for one in parse(value.__doc__ or "").params}
    ignored = (Parameter.VAR_POSITIONAL,)
    taken = [one.name for one in signature(value).parameters.values() if one.kind not in ignored]
    return [name for name in taken if name not in explained]
