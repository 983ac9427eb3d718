"""Every way to a setting has the same default: command line, YAML, callbacks, dataclasses, functions."""

import inspect
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import gqaprune
from gqaprune.callbacks import CheckpointExport, PerplexityGuard, SampleGenerations, TaylorPruning
from gqaprune.cli import main
from gqaprune.commands.compare import compare
from gqaprune.commands.export import export
from gqaprune.commands.inspect import inspect as inspect_model
from gqaprune.commands.measure import Measuring
from gqaprune.commands.search import SearchSettings
from gqaprune.data.calibration import CalibrationSet
from gqaprune.data.sampling import sample_from_model
from gqaprune.data.windows import read_windows
from gqaprune.datamodules import TextDataModule
from gqaprune.datamodules.config import CalibrationConfig, EvaluationConfig, SamplingConfig, TrainingConfig
from gqaprune.models.architecture import find_blocks
from gqaprune.models.loading import load, load_model
from gqaprune.models.soft_targets import measure_divergence, measure_divergence_from_top
from gqaprune.module import CausalLMModule
from gqaprune.placement.model_source import ModelSource
from gqaprune.planning.allocation import AllocationOptions, Budget
from gqaprune.planning.config import PruningConfig
from gqaprune.planning.groups import LimitsConfig, SensitivityConfig
from gqaprune.scoring.scores import score_units
from gqaprune.surgery.repair import apply_plan_with_repair
from gqaprune.surgery.repair_config import RepairConfig
from gqaprune.training.optimizers import OptimizerConfig
from gqaprune.training.recovery import RecoveryConfig
from gqaprune.training.teacher import cache_teacher

from tiny import make_model, make_tokens

GROUPS: dict[str, Any] = {
    "pruning": PruningConfig(),
    "data.calibration": CalibrationConfig(),
    "data.training": TrainingConfig(),
    "data.evaluation": EvaluationConfig(),
    "data.sampling": SamplingConfig(),
    "model.recovery": RecoveryConfig(),
}
CLASSES: dict[str, Callable[..., Any]] = {
    "pruning": TaylorPruning,
    "guard": PerplexityGuard,
    "samples": SampleGenerations,
    "export": CheckpointExport,
    "data": TextDataModule,
    "model": CausalLMModule,
}


def list_defaults(call: Callable[..., Any]) -> dict[str, Any]:
    """Arguments that have a default, with it."""
    parameters = inspect.signature(call).parameters.values()
    return {one.name: make_plain(one.default) for one in parameters if one.default is not one.empty}


def make_plain(value: Any) -> Any:
    """As YAML holds it."""
    if is_dataclass(value) and not isinstance(value, type):
        return make_plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): make_plain(one) for key, one in value.items()}
    return [make_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


@pytest.fixture
def read_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """All settings of a command as it would run."""

    def read(command: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", ["gqaprune", command, "--model.pretrained", "m", *arguments, "--print_config"])
        capsys.readouterr()
        assert main() == 0
        settings: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
        return settings

    return read


def check_settings(settings: dict[str, Any]) -> None:
    for name, group in GROUPS.items():
        found: Any = settings
        for part in name.split("."):
            found = found[part]
        assert {key: found[key] for key in asdict(group)} == make_plain(group), name
    for name, call in CLASSES.items():
        for key, value in list_defaults(call).items():
            if key not in ("optimizer", "trust_remote_code") and key in settings[name]:
                assert settings[name][key] == value, f"{name}.{key}"


@pytest.mark.parametrize("command", ["fit", "prune", "search"])
def test_commands_have_the_defaults_of_the_classes(command: str, read_command: Callable[..., dict[str, Any]]) -> None:
    settings = read_command(command)
    check_settings(settings)
    if command == "search":
        assert settings["search"] == asdict(SearchSettings())


def test_groups_that_yaml_leaves_empty_or_sets_in_part_keep_the_other_defaults(
    read_command: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    groups = {name.split(".")[1]: {} for name in GROUPS if name.startswith("data.")}
    empty = {"pruning": {"repair": {}, "limits": {}, "swaps": {}}, "data": groups, "model": {"recovery": {}}}
    (tmp_path / "empty.yaml").write_text(yaml.safe_dump(empty))
    check_settings(read_command("fit", "--config", str(tmp_path / "empty.yaml")))
    (tmp_path / "part.yaml").write_text("pruning: {repair: {epochs: 7}}\n")
    found = read_command("fit", "--config", str(tmp_path / "part.yaml"))["pruning"]["repair"]
    assert found == make_plain(RepairConfig(epochs=7))


def test_the_callback_and_groups_of_python_have_the_defaults_of_the_dataclass() -> None:
    assert TaylorPruning().config == PruningConfig()
    for field in fields(PruningConfig):
        if is_dataclass(field.default):
            assert getattr(PruningConfig(**{field.name: {}}), field.name) == field.default
    data = TextDataModule("m")
    for name in ("calibration", "training", "evaluation", "sampling"):
        assert getattr(data, name) == GROUPS[f"data.{name}"]
        assert getattr(TextDataModule("m", **{name: {}}), name) == GROUPS[f"data.{name}"]
    assert CalibrationSet([]).accumulation == TaylorPruning().scheduling[0]


def test_repair_by_itself_does_what_prune_does_with_its_defaults() -> None:
    batches = [make_tokens(2, seed=seed) for seed in range(3)]
    pruned, repaired = make_model("llama"), make_model("llama")
    plan, report = gqaprune.prune(pruned, batches, PruningConfig(limits={"mlp_layers": (0, 3)}))
    assert apply_plan_with_repair(repaired, plan, batches) == report.repairs != []
    for one, other in zip(pruned.state_dict().values(), repaired.state_dict().values(), strict=True):
        assert torch.equal(one, other)


SAME: list[tuple[Callable[..., Any], str, Callable[..., Any], str]] = [
    (sample_from_model, "document", SamplingConfig, "document"),
    (sample_from_model, "temperature", SamplingConfig, "temperature"),
    (sample_from_model, "top_p", SamplingConfig, "top_p"),
    (sample_from_model, "window", CalibrationConfig, "window"),
    (sample_from_model, "seed", TextDataModule, "seed"),
    (read_windows, "window", CalibrationConfig, "window"),
    (read_windows, "window", TrainingConfig, "window"),
    (read_windows, "limit", TrainingConfig, "tokens"),
    (read_windows, "seed", TextDataModule, "seed"),
    (read_windows, "bos", TextDataModule, "bos"),
    (CalibrationSet, "seed", TextDataModule, "seed"),
    (compare, "eval_window", EvaluationConfig, "window"),
    (compare, "eval_stride", EvaluationConfig, "stride"),
    (compare, "eval_tokens", EvaluationConfig, "tokens"),
    (compare, "bos", TextDataModule, "bos"),
    (compare, "dtype", CausalLMModule, "dtype"),
    (export, "dtype", CausalLMModule, "dtype"),
    (inspect_model, "dtype", CausalLMModule, "dtype"),
    (inspect_model, "gradient_checkpointing", CausalLMModule, "gradient_checkpointing"),
    (load_model, "dtype", CausalLMModule, "dtype"),
    (load_model, "attn_implementation", CausalLMModule, "attn_implementation"),
    (load, "dtype", CausalLMModule, "dtype"),
    (ModelSource, "dtype", CausalLMModule, "dtype"),
    (gqaprune.save, "format", CheckpointExport, "format"),
    (gqaprune.save, "max_shard_size", CheckpointExport, "max_shard_size"),
    (gqaprune.save, "quantization", CheckpointExport, "quantization"),
    (export, "format", CheckpointExport, "format"),
    (export, "max_shard_size", CheckpointExport, "max_shard_size"),
    (export, "quantization", CheckpointExport, "quantization"),
    (AllocationOptions, "alpha", SensitivityConfig, "alpha"),
    (AllocationOptions, "log", SensitivityConfig, "log"),
    (AllocationOptions, "frozen_layers", LimitsConfig, "frozen_layers"),
    (Budget, "min_rate", LimitsConfig, "min_rate"),
    (Budget, "max_rate", LimitsConfig, "max_rate"),
    (Budget, "kv_rate", PruningConfig, "kv_rate"),
    (find_blocks, "granularity", PruningConfig, "granularity"),
    (OptimizerConfig, "schedule", CausalLMModule, "schedule"),
    (OptimizerConfig, "warmup_steps", CausalLMModule, "warmup_steps"),
    (measure_divergence, "temperature", RecoveryConfig, "temperature"),
    (measure_divergence_from_top, "temperature", RecoveryConfig, "temperature"),
    (cache_teacher, "temperature", RecoveryConfig, "temperature"),
    *((compare, name, Measuring, name) for name in ("eval_window", "eval_stride", "eval_tokens", "bos", "dtype")),
]
"""Arguments of functions that a setting is passed on to, and the setting."""


@pytest.mark.parametrize(("call", "argument", "group", "setting"), SAME)
def test_a_function_has_the_default_of_the_setting_that_it_is_given(
    call: Callable[..., Any], argument: str, group: Callable[..., Any], setting: str
) -> None:
    assert list_defaults(call)[argument] == list_defaults(group)[setting]


def test_inspect_counts_the_tokens_that_runs_have_by_default() -> None:
    defaults, training, calibration = list_defaults(inspect_model), TrainingConfig(), CalibrationConfig()
    assert defaults["tokens"] == training.window * training.batch_size == calibration.window * calibration.batch_size
    assert calibration.windows is not None
    assert defaults["calibration_tokens"] == calibration.windows * calibration.window


def test_scores_without_settings_are_those_of_the_settings_defaults() -> None:
    model, text = make_model("llama"), CalibrationSet([make_tokens(2)])
    blocks = find_blocks(model)
    default = score_units(model, blocks, text, "fisher")
    given = score_units(model, blocks, text, "fisher", PruningConfig().scoring)
    assert all(torch.equal(default[key], given[key]) for key in default)
