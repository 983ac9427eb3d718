"""Tables of renamed settings, arguments and modules, each with its new name.

Using an old name on the command line, in a configuration file or in Python raises an error with the new name.
"""

import functools
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
G = TypeVar("G")

SETTINGS: Mapping[str, str] = {
    "pruning.reduction": "pruning.scoring.reduction",
    "pruning.normalization": "pruning.scoring.normalization",
    "pruning.obs_ridge": "pruning.scoring.obs_ridge",
    "pruning.protect_outliers": "pruning.scoring.protect_outliers",
    "pruning.sensitivity": "pruning.sensitivity.method",
    "pruning.sensitivity_path": "pruning.sensitivity.path",
    "pruning.alpha": "pruning.sensitivity.alpha",
    "pruning.log_importance": "pruning.sensitivity.log",
    "pruning.frozen_layers": "pruning.limits.frozen_layers",
    "pruning.swap_generations": "pruning.swaps.generations",
    "pruning.swap_offspring": "pruning.swaps.offspring",
    "pruning.attention_layers": "pruning.limits.attention_layers",
    "pruning.mlp_layers": "pruning.limits.mlp_layers",
    "pruning.min_groups": "pruning.limits.min_groups",
    "pruning.min_channels": "pruning.limits.min_channels",
    "pruning.min_rate": "pruning.limits.min_rate",
    "pruning.max_rate": "pruning.limits.max_rate",
    "pruning.channel_multiple": "pruning.limits.channel_multiple",
    "pruning.repair": "pruning.repair.method",
    "pruning.repair_pull": "pruning.repair.pull",
    "pruning.repair_everywhere": "pruning.repair.everywhere",
    "pruning.repair_ridges": "pruning.repair.ridges",
    "pruning.repair_holdout": "pruning.repair.holdout",
    "pruning.repair_bias": "pruning.repair.bias",
    "pruning.repair_epochs": "pruning.repair.epochs",
    "pruning.repair_learning_rate": "pruning.repair.learning_rate",
    "data.calibration": "data.calibration.corpora",
    "data.calibration_windows": "data.calibration.windows",
    "data.calibration_window": "data.calibration.window",
    "data.calibration_batch_size": "data.calibration.batch_size",
    "data.held_out_windows": "data.calibration.held_out_windows",
    "data.sampled_windows": "data.calibration.sampled_windows",
    "data.train": "data.training.corpora",
    "data.train_window": "data.training.window",
    "data.train_tokens": "data.training.tokens",
    "data.train_sampled_windows": "data.training.sampled_windows",
    "data.batch_size": "data.training.batch_size",
    "data.val": "data.evaluation.val",
    "data.test": "data.evaluation.test",
    "data.eval_window": "data.evaluation.window",
    "data.eval_stride": "data.evaluation.stride",
    "data.eval_tokens": "data.evaluation.tokens",
    "data.eval_batch_size": "data.evaluation.batch_size",
    "data.sampled_document": "data.sampling.document",
    "data.sampled_prompts": "data.sampling.prompts",
    "data.temperature": "data.sampling.temperature",
    "data.top_p": "data.sampling.top_p",
}
"""Old full name of a setting -> its new name. Some old names are groups today."""

GROUPS = tuple(old for old, new in SETTINGS.items() if new.startswith(f"{old}."))
"""Groups of settings whose names were once single settings."""

ARGUMENTS: Mapping[str, str] = {
    "prune.accumulate": "CalibrationSet(batches, accumulation=...) as the second argument",
    "prune.source": "CalibrationSet(batches, source=...) as the second argument",
    "prune.seed": "CalibrationSet(batches, seed=...) as the second argument",
    "prune.corpora": "CalibrationSet(batches, corpora=...) as the second argument",
}
"""Function and argument -> its replacement."""

MODULES: Mapping[str, str] = {
    "accumulation": "training.accumulation",
    "allocation": "planning.allocation",
    "architecture": "models.architecture",
    "card": "checkpoints.card",
    "checkpoint": "checkpoints.save",
    "compilation": "training.compilation",
    "config": "planning.config",
    "corpora": "data.corpora",
    "counts": "planning.counts",
    "criteria": "scoring.criteria",
    "damage": "scoring.damage",
    "dense": "checkpoints.origin",
    "diagnosis": "evaluation.diagnosis",
    "distillation": "models.soft_targets",
    "distributed": "common.distributed",
    "errors": "common.errors",
    "families": "models.families",
    "figures": "reporting.figures",
    "gates": "models.gates",
    "generation": "evaluation.generation",
    "gguf_file": "checkpoints.gguf_writer",
    "gram": "surgery.gram",
    "holding": "placement.layer_store",
    "importance": "scoring.scores",
    "judgement": "evaluation.judgement",
    "layerwise": "models.layerwise",
    "least_squares": "surgery.least_squares",
    "likeness": "surgery.compatibility",
    "loading": "models.loading",
    "loading_by_layer": "placement.loading_by_layer",
    "losses": "models.losses",
    "offload": "placement.disk_store",
    "outliers": "scoring.outliers",
    "padding": "checkpoints.padding",
    "page": "reporting.page",
    "page_style": "reporting.page",
    "per_layer": "models.per_layer",
    "perplexity": "evaluation.perplexity",
    "predictions": "evaluation.predictions",
    "processes": "common.atomic_files",
    "processor": "common.cpu",
    "progress": "common.console",
    "prompts": "data.prompts",
    "provenance": "common.provenance",
    "reconstruction": "surgery.repair",
    "recovery": "training.recovery",
    "refinement": "surgery.refinement",
    "repetition": "evaluation.repetition",
    "replace": "common.atomic_files",
    "report": "reporting.report",
    "resume": "training.resume",
    "run_log": "common.run_log",
    "sampling": "data.sampling",
    "selection": "planning.selection",
    "sensitivity": "scoring.sensitivity",
    "sharding": "placement.fsdp",
    "sources": "models.sources",
    "splitting": "placement.sharded_store",
    "stages": "common.stage_cache",
    "steps": "planning.allocation.steps",
    "teacher": "training.teacher",
    "tokenizer": "models.tokenizer",
    "tools": "commands",
    "undoing": "evaluation.gated_plan",
    "walk": "surgery.streams",
    "windows": "data.windows",
}
"""Old module below `gqaprune` -> its new place."""


ATTRIBUTES: Mapping[str, str] = {
    "CausalLMModule.adapted": "adapters.view",
    "CausalLMModule.attn_implementation": "source.attn_implementation",
    "CausalLMModule.compile_layers": "layer_compiler.is_on",
    "CausalLMModule.dtype_name": "source.dtype",
    "CausalLMModule.goes_on": "plan_is_from_checkpoint",
    "CausalLMModule.load_dense": "source.load",
    "CausalLMModule.optimizer_factory": "optimizer_config.factory",
    "CausalLMModule.pretrained": "source.pretrained",
    "CausalLMModule.run": "run_id",
    "CausalLMModule.schedule": "optimizer_config.schedule",
    "CausalLMModule.trust_remote_code": "source.trust_remote_code",
    "CausalLMModule.warmup_steps": "optimizer_config.warmup_steps",
    "TaylorPruning.layers_apart": "placement",
    **{
        f"{owner}.{old.removeprefix(group)}": new.removeprefix(group)
        for owner, group in (("PruningConfig", "pruning."), ("TextDataModule", "data."))
        for old, new in SETTINGS.items()
        if old.startswith(group) and old not in GROUPS
    },
}
"""Class and old attribute -> its new name, in the same object."""

NAMES: Mapping[str, str] = {
    "architecture.BlockKey": "plan.BlockKey",
    "checkpoint.FORMATS": "checkpoints.formats.FORMATS",
    "checkpoint.choose_format": "checkpoints.formats.choose_format",
    "compilation.CompiledLayers": "training.compilation.LayerCompiler",
    "counts.check_goes_by_layer": "planning.preflight.check_goes_by_layer",
    "counts.check_reachable": "planning.preflight.check_reachable",
    "counts.check_text": "planning.preflight.check_text",
    "criteria.base.Calibration": "scoring.criteria.base.ScoringRun",
    "criteria.base.ScoringOptions": "scoring.criteria.base.ScoringConfig",
    "families.BlockKind": "plan.BlockKind",
    "gram.split_rows": "surgery.gram.chunk_rows",
    "holding.LayersApart": "placement.layer_store.LayerStore",
    "holding.are_layers_apart": "placement.layer_store.LayerStore.is_in_memory",
    "holding.attend_writing": "placement.writing_by_layer.attend_writing",
    "holding.detach_parameters": "placement.writing_by_layer.detach_parameters",
    "holding.get_layers_apart": "placement.layer_store.find_store",
    "holding.hold_each": "placement.layer_store.LayerStore.hold_each",
    "holding.hold_layer": "placement.layer_store.LayerStore.hold",
    "holding.hold_layers_that_run": "placement.layer_store.LayerStore.hold_running_layers",
    "holding.keep_apart": "placement.layer_store.set_store",
    "holding.move_model": "placement.layer_store.LayerStore.move_to",
    "holding.name_layer": "placement.layer_store.get_layer_parameters",
    "holding.name_outside": "placement.layer_store.get_outside_parameters",
    "holding.named_parameters": "placement.layer_store.LayerStore.named_parameters",
    "holding.run_decoder_by_layer": "placement.layer_store.LayerStore.run_decoder",
    "holding.write_weights": "placement.writing_by_layer.write_weights",
    "importance.ScoringOptions": "scoring.criteria.base.ScoringConfig",
    "likeness.check_likeness": "surgery.compatibility.check_compatibility",
    "loading.DTYPES": "models.dtypes.DTYPES",
    "loading.check_dtype": "models.dtypes.check_dtype",
    "offload.LayersOnDisk": "placement.disk_store.DiskStore",
    "offload.fill_outside": "placement.disk_store.read_outside_parameters",
    "predictions.Comparison": "evaluation.predictions.TextPair",
    "reconstruction.RepairOptions": "surgery.repair_config.RepairConfig",
    "recovery.add_adapters": "training.lora.add_adapters",
    "recovery.list_projections": "training.lora.list_projections",
    "recovery.merge_adapters": "checkpoints.adapters.merge_adapters",
    "refinement.RefinementOptions": "surgery.repair_config.RepairConfig",
    "report.describe_protocol": "data.windows.describe_protocol",
    "selection.check_equal_counts": "planning.preflight.check_equal_counts",
    "sharding.is_split": "models.wrapping.is_sharded",
    "sharding.unwrap_model": "models.wrapping.unwrap_model",
    "sharding.unwrap_name": "models.wrapping.unwrap_name",
    "splitting.SplitLayers": "placement.sharded_store.ShardedStore",
    "splitting.make_layers_whole": "placement.sharded_store.gather_layers",
    "splitting.split_layers": "placement.sharded_store.shard_layers",
    "stages.Stage": "common.stage_cache.StageResult",
    "stages.Stages": "common.stage_cache.StageCache",
    "stages.hash_model": "placement.model_hash.hash_model",
    "stages.hash_tensors": "placement.model_hash.hash_tensors",
    "surgery.apply_plan": "surgery.cut.apply_plan",
    "surgery.check_plan": "surgery.cut.check_plan",
    "surgery.cut_block": "surgery.cut.cut_block",
    "surgery.expand_units": "surgery.cut.expand_units",
    "surgery.keep_units": "surgery.cut.keep_units",
    "surgery.list_kept_columns": "surgery.cut.list_kept_columns",
    "surgery.write_shapes": "surgery.cut.write_shapes",
    "tools.inspect.estimate_memory": "planning.memory.estimate_memory",
    "undoing.measure_even_broken": "evaluation.gated_plan.measure_perplexity_or_infinity",
    "walk.Passage": "surgery.streams.BlockActivations",
    "walk.Walk": "surgery.streams.Streams",
}
"""Name in a moved module -> its new place and name, if it did not move with its module."""


def describe_rename(old: str) -> str | None:
    """Return a sentence with the new name of a setting; None if it was not renamed."""
    new = SETTINGS.get(old)
    return None if new is None else f"{old} is now {new}"


def find_renamed_setting(message: str) -> str | None:
    """Find the first old name of a setting in another library's error; return the sentence with its new name."""
    for name in re.findall(r"\b(?:pruning|data)(?:\.\w+)+", message):
        if (sentence := describe_rename(name)) is not None:
            return sentence
    return None


def name_successors(group: str, table: Mapping[str, str] = SETTINGS) -> Callable[[F], F]:
    """Decorate a function so that an argument's old name raises an error with the new one.

    Args:
        group: prefix of the argument in the table: `pruning` for `pruning.repair_pull`.
        table: old names -> new names.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def checked(*arguments: Any, **keywords: Any) -> Any:
            for name in keywords:
                old = f"{group}.{name}"
                if old in table and not any(new.startswith(f"{old}.") for new in table.values()):
                    raise ValueError(f"{old} is now {table[old]}")
            return function(*arguments, **keywords)

        return checked  # type: ignore[return-value]

    return decorate


def build_group(name: str, group: type[G], value: G | Mapping[str, Any]) -> G:
    """Build a group of settings from a dictionary, or return it as it is.

    Args:
        name: full name of the group, such as `pruning.limits`.
        group: dataclass of the group.
        value: an instance, or settings by their names.

    Raises:
        ValueError: if the value is neither, or has a setting that the group lacks.
    """
    if isinstance(value, group):
        return value
    names = [setting.name for setting in fields(group)]  # type: ignore[arg-type]  # a dataclass
    if not isinstance(value, Mapping):
        renamed = f": {describe_rename(name)}" if name in SETTINGS else ""
        raise ValueError(f"{name} is a group of settings ({', '.join(names)}), got {value!r}{renamed}")
    if unknown := sorted(set(value) - set(names)):
        raise ValueError(f"{name} has no setting {unknown[0]!r}; it has {', '.join(names)}")
    return group(**value)


def describe_move(module: str) -> str | None:
    """Return a sentence with the new place of a module; None if it has not moved.

    Args:
        module: name of the module below `gqaprune`.
    """
    if (new := MODULES.get(module)) is None:
        return None
    moved = {old.removeprefix(f"{module}."): now for old, now in NAMES.items() if old.startswith(f"{module}.")}
    parts = (f"{old} is gqaprune.{now}" for old, now in moved.items())
    return f"gqaprune.{module} is now gqaprune.{new}" + (f"; its {', its '.join(parts)}" if moved else "")


def refuse_moved_name(module: str, name: str) -> NoReturn:
    """Raise an error for a name that a package no longer has.

    Raises:
        ImportError: with the name's new place, if it has moved.
        AttributeError: if there never was such a name.
    """
    if (new := NAMES.get(f"{module}.{name}")) is not None:
        raise ImportError(f"gqaprune.{module}.{name} is now gqaprune.{new}", name=name)
    raise AttributeError(f"module 'gqaprune.{module}' has no attribute {name!r}")


class RenamedAttributes:
    """Mixin for classes, which raises an error with the new name when an attribute's old name is used."""

    if not TYPE_CHECKING:  # so that type checkers still report unknown attributes

        def __getattr__(self, name: str) -> Any:
            for owner in type(self).__mro__:
                if (new := ATTRIBUTES.get(f"{owner.__name__}.{name}")) is not None:
                    raise AttributeError(f"{owner.__name__}.{name} is now {owner.__name__}.{new}")
            if (inherited := getattr(super(), "__getattr__", None)) is not None:
                return inherited(name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class _OldModules(MetaPathFinder):
    """Raises an error with the new place when a moved module is imported; asked after all other finders."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> None:
        package, _, module = name.partition(".")
        if package == "gqaprune" and (sentence := describe_move(module)) is not None:
            raise ModuleNotFoundError(sentence, name=name)


def name_moved_modules() -> None:
    """Make imports of old module names raise errors with the new names."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())
