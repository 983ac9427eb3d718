"""Every file of `configs/` is understood: by itself, or added to a model's."""

from pathlib import Path

import pytest

from gqaprune.cli.lightning_cli import PruningCLI

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
MODEL_CONFIGS = [path for path in CONFIGS if path.parent.name == "configs"]
GPU_CONFIGS = [path for path in CONFIGS if path.stem in ("fsdp", "deepspeed_2", "deepspeed_3")]
RECOVERY_CONFIGS = [path for path in CONFIGS if path.parent.name == "recovery"]
GOAL_CONFIGS = [path for path in CONFIGS if path.parent.name == "goal"]
STRATEGY_CONFIGS = [path for path in CONFIGS if path.parent.name == "strategy" and path not in GPU_CONFIGS]


@pytest.fixture(autouse=True)
def _no_arguments_and_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["gqaprune"])


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=lambda path: path.stem)
def test_every_model_config_parses_and_instantiates(path: Path) -> None:
    cli = PruningCLI(run=False, args=["--config", str(path), "--trainer.accelerator", "cpu"])
    assert cli.model.source.pretrained and cli.datamodule.tokenizer_source == cli.model.source.pretrained


@pytest.mark.parametrize("path", STRATEGY_CONFIGS, ids=lambda path: path.stem)
def test_every_strategy_config_composes_with_a_model_config(path: Path) -> None:
    base = next(config for config in MODEL_CONFIGS if config.stem == "llama3_8b")
    arguments = ["--config", str(base), "--config", str(path), "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    cli = PruningCLI(run=False, args=arguments)
    assert cli.model.source.pretrained == "meta-llama/Meta-Llama-3-8B"
    expected = {"fsdp2": "ModelParallelStrategy"}.get(path.stem, "DDPStrategy")
    assert type(cli.trainer.strategy).__name__ == expected
    if path.stem == "fsdp2":
        assert cli.trainer.strategy._data_parallel_size == 2


@pytest.mark.parametrize("added", RECOVERY_CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("base", MODEL_CONFIGS, ids=lambda path: path.stem)
def test_every_recovery_can_be_added_to_every_model(base: Path, added: Path) -> None:
    arguments = [argument for path in (base, added) for argument in ("--config", str(path))]
    cli = PruningCLI(run=False, args=[*arguments, "--trainer.accelerator", "cpu", "--trainer.devices", "1"])
    watches = [callback for callback in cli.trainer.callbacks if getattr(callback, "monitor", None) == "ppl/wikitext2"]
    assert len(watches) == (2 if added.stem == "stop_early" else 0)


@pytest.mark.parametrize("added", GOAL_CONFIGS, ids=lambda path: path.stem)
def test_every_goal_can_be_added_to_a_model(added: Path) -> None:
    base = next(config for config in MODEL_CONFIGS if config.stem == "llama3_8b")
    arguments = [
        "--config",
        str(base),
        "--config",
        str(added),
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        "1",
    ]
    config = PruningCLI(run=False, args=arguments).config_init.pruning.config
    assert (config.kv_rate > 0) == (added.stem in ("kv_cache", "both")) and (config.rate > 0) == (
        added.stem != "kv_cache"
    )
    assert (config.repair.method == "none") == added.stem.startswith("like_")


@pytest.mark.parametrize("path", GPU_CONFIGS, ids=lambda path: path.stem)
def test_every_strategy_config_that_lightning_refuses_without_gpus_is_parsed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PruningCLI, "instantiate_classes", lambda _: None)
    monkeypatch.setattr(PruningCLI, "after_instantiate_classes", lambda _: None)
    base = next(config for config in MODEL_CONFIGS if config.stem == "llama3_8b")
    trainer = PruningCLI(run=False, args=["--config", str(base), "--config", str(path)]).config.trainer
    name, settings = {
        "fsdp": ("FSDPStrategy", {"state_dict_type": "sharded"}),
        "deepspeed_2": ("DeepSpeedStrategy", {"stage": 2}),
        "deepspeed_3": ("DeepSpeedStrategy", {"stage": 3}),
    }[path.stem]
    assert trainer.strategy.class_path.split(".")[-1] == name and trainer.precision == "bf16-true"
    assert settings.items() <= trainer.strategy.init_args.as_dict().items()
