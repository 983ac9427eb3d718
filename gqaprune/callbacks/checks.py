"""Settings that exclude one another, refused before any work."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from gqaprune.datamodules import TextDataModule
from gqaprune.models.sources import load_config
from gqaprune.module import CausalLMModule
from gqaprune.placement.layer_store import LayersApart
from gqaprune.planning.config import PruningConfig
from gqaprune.planning.preflight import check_goes_by_layer


def check_rounds(trainer: Trainer, module: CausalLMModule, config: PruningConfig) -> None:
    """Refuse rounds where the model cannot be cut between steps, before any work."""
    rounds = module.recovery.rounds
    if rounds == 1:
        return
    is_whole = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
    if not is_whole or isinstance(trainer.strategy, DeepSpeedStrategy):
        name = type(trainer.strategy).__name__
        raise ValueError(
            f"recovery.rounds {rounds} cuts whole models between steps, which {name} splits: set rounds to 1, or "
            "trainer.strategy to ddp"
        )
    if config.uses_damage_curves or config.swap_generations:
        name = "damage_levels" if config.uses_damage_curves else "swap_generations"
        raise ValueError(f"{name} measures cuts of the whole model, which several rounds have not: set rounds to 1")


def check_schedule(trainer: Trainer, module: CausalLMModule) -> None:
    """Refuse a course of the learning rate, or rounds, whose end nothing tells, before any work."""
    is_endless = trainer.max_epochs == -1 and trainer.max_steps == -1 and trainer.limit_train_batches != 0
    if is_endless and (module.schedule != "constant" or module.recovery.rounds > 1):
        raise ValueError(
            f"model.schedule {module.schedule} and recovery.rounds {module.recovery.rounds} need the number of steps, "
            "which trainer.max_time does not tell: set trainer.max_steps or trainer.max_epochs beside it, or "
            "model.schedule to constant and recovery.rounds to 1"
        )


def check_teacher(trainer: Trainer, module: CausalLMModule, config: PruningConfig) -> None:
    """Refuse a teacher that the model cannot learn from, before any work."""
    settings = module.recovery
    if not settings.distills or trainer.limit_train_batches == 0:
        return
    source = module.teacher_source
    is_itself = source == module.pretrained and (module.plan is None or module.plan.removes_nothing)
    if is_itself and not config.removes_something:
        raise ValueError(
            f"recovery.mode {settings.mode} would learn from {source} itself, which this run does not prune: name the "
            "dense model by model.recovery.teacher"
        )
    student, teacher = (
        load_config(name, module.trust_remote_code).get_text_config() for name in (module.pretrained, source)
    )
    names = ["vocab_size", *(["hidden_size"] if settings.hidden_weight else [])]
    for name in names:
        own, other = getattr(student, name), getattr(teacher, name)
        if own != other:
            raise ValueError(
                f"{source} has {name} {other}, {module.pretrained} has {own}: take a teacher with the same"
            )
    layers = min(student.num_hidden_layers, teacher.num_hidden_layers)
    if settings.hidden_weight and max(settings.hidden_layers or [0]) >= layers:
        raise ValueError(f"recovery.hidden_layers has to be of 0 to {layers - 1}, got {settings.hidden_layers}")


def check_compile(trainer: Trainer, module: CausalLMModule) -> None:
    """Refuse to compile layers that a strategy is going to split, before any work."""
    if module.compile_layers and isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy)):
        raise ValueError(
            f"model.compile compiles whole layers, which {type(trainer.strategy).__name__} splits: set it to false, or "
            "trainer.strategy to ddp or auto"
        )


def check_offload(trainer: Trainer, module: CausalLMModule) -> None:
    """Refuse what layers on disk exclude, before any work."""
    if trainer.limit_train_batches != 0:
        raise ValueError(
            f"offload keeps on disk what recovery.mode {module.recovery.mode} would train: take gqaprune prune, or set "
            "recovery.mode to none, and train what it writes afterwards"
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise ValueError(
            f"offload works on one device, got {type(trainer.strategy).__name__}: set trainer.devices to 1 and "
            "trainer.strategy to auto"
        )


def check_sharded(trainer: Trainer) -> None:
    """Refuse to split layers where there is nothing to split them over, before any work."""
    strategy, processes = trainer.strategy, trainer.world_size
    is_split = isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["data_parallel"].size() == processes
    if not is_split:
        raise ValueError(
            f"sharded splits layers over all {processes} processes of a ModelParallelStrategy, got "
            f"{type(strategy).__name__}: set trainer.strategy as configs/strategy/fsdp2.yaml does, its "
            f"data_parallel_size to {processes} and its tensor_parallel_size to 1"
        )


def check_apart(
    trainer: Trainer, module: CausalLMModule, data: TextDataModule, config: PruningConfig, apart: type[LayersApart]
) -> None:
    """Refuse what needs the whole model in memory, before any work."""
    trains = trainer.limit_train_batches != 0
    for name, is_used in (("sampled_windows", module.plan is None), ("train_sampled_windows", trains)):
        if is_used and (windows := getattr(data, name)):
            raise ValueError(
                f"data.{name} {windows} needs the whole model in memory, which {apart.reason}: set it to 0 and take "
                "text from corpora"
            )
    if module.plan is None:
        check_goes_by_layer(config, apart)
