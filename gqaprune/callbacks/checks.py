"""Settings that exclude one another, refused before any work."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from gqaprune.callbacks.parts import get_parts
from gqaprune.checkpoints.origin import find_teacher
from gqaprune.common.atomic_files import check_can_be_folder
from gqaprune.data.corpora import EMBEDDED
from gqaprune.datamodules import TextDataModule
from gqaprune.models.architecture import check_context
from gqaprune.models.sources import EMBEDDED_MODEL, load_config
from gqaprune.module import CausalLMModule
from gqaprune.placement.layer_store import Placement
from gqaprune.planning.config import PruningConfig
from gqaprune.planning.preflight import check_goes_by_layer
from gqaprune.training.lora import check_targets
from gqaprune.training.teacher import CACHE_FOLDER, check_top_k


def check_rounds(trainer: Trainer, module: CausalLMModule, config: PruningConfig) -> None:
    """Refuse rounds where the model cannot be cut between steps, before any work."""
    rounds = module.recovery.rounds
    if rounds == 1:
        return
    is_whole = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
    if not is_whole or isinstance(trainer.strategy, DeepSpeedStrategy):
        name = type(trainer.strategy).__name__
        raise ValueError(
            f"recovery.rounds {rounds} cuts whole models between steps, which {name} shards: set rounds to 1, or "
            "trainer.strategy to ddp"
        )
    is_gated = config.uses_damage_curves and not config.sees_repair
    if is_gated or config.swaps.generations:
        name = "damage: gated" if is_gated else "swaps.generations"
        raise ValueError(f"{name} measures cuts of the whole model, which several rounds have not: set rounds to 1")


def check_schedule(trainer: Trainer, module: CausalLMModule) -> None:
    """Refuse a course of the learning rate, or rounds, whose end nothing tells, before any work."""
    schedule = module.optimizer_config.schedule
    is_endless = trainer.max_epochs == -1 and trainer.max_steps == -1 and trainer.limit_train_batches != 0
    if is_endless and (schedule != "constant" or module.recovery.rounds > 1):
        raise ValueError(
            f"model.schedule {schedule} and recovery.rounds {module.recovery.rounds} need the number of steps, which "
            "trainer.max_time does not tell: set trainer.max_steps or trainer.max_epochs beside it, or "
            "model.schedule to constant and recovery.rounds to 1"
        )


def check_teacher(trainer: Trainer, module: CausalLMModule, config: PruningConfig) -> None:
    """Refuse a teacher that the model cannot learn from, before any work."""
    settings = module.recovery
    if not settings.distills or trainer.limit_train_batches == 0:
        return
    own_source, source = module.source.pretrained, find_teacher(module.source, module.recovery).pretrained
    is_itself = source == own_source and (module.plan is None or module.plan.removes_nothing)
    if is_itself and not config.removes_something:
        raise ValueError(
            f"recovery.mode {settings.mode} would learn from {source} itself, which this run does not prune: name the "
            "dense model by model.recovery.teacher"
        )
    student = module.source.read_config().get_text_config()
    teacher = load_config(source, module.source.trust_remote_code).get_text_config()
    names = ["vocab_size", *(["hidden_size"] if settings.hidden_weight else [])]
    for name in names:
        own, other = getattr(student, name), getattr(teacher, name)
        if own != other:
            raise ValueError(f"{source} has {name} {other}, {own_source} has {own}: take a teacher with the same")
    if settings.teacher_top_k:
        check_top_k(settings.teacher_top_k, teacher.vocab_size)
        check_can_be_folder(CACHE_FOLDER)
    check_context(teacher, get_parts(trainer, module)[1].training.window, f"data.training.window for {source}")
    layers = min(student.num_hidden_layers, teacher.num_hidden_layers)
    if settings.hidden_weight and max(settings.hidden_layers or [0]) >= layers:
        raise ValueError(f"recovery.hidden_layers has to be of 0 to {layers - 1}, got {settings.hidden_layers}")


def check_adapters(trainer: Trainer, module: CausalLMModule) -> None:
    """Refuse adapters of what is no projection of the model, before any work."""
    if module.recovery.uses_lora and trainer.limit_train_batches != 0:
        source = module.source
        check_targets(source.read_config().get_text_config(), module.recovery)


def check_compile(trainer: Trainer, module: CausalLMModule) -> None:
    """Refuse to compile layers that a strategy is going to shard, or where torch cannot compile, before any work."""
    if module.layer_compiler.is_on and isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy)):
        raise ValueError(
            f"model.compile compiles whole layers, which {type(trainer.strategy).__name__} shards: set it to false, or "
            "trainer.strategy to ddp or auto"
        )
    if trainer.limit_train_batches != 0:
        module.layer_compiler.rehearse(trainer.strategy.root_device)


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
    """Refuse to shard layers where there is nothing to shard them over, before any work."""
    strategy, processes = trainer.strategy, trainer.world_size
    uses_all = isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["data_parallel"].size() == processes
    if not uses_all:
        raise ValueError(
            f"sharded needs all {processes} processes of a ModelParallelStrategy, got "
            f"{type(strategy).__name__}: set trainer.strategy as configs/strategy/fsdp2.yaml does, its "
            f"data_parallel_size to {processes} and its tensor_parallel_size to 1"
        )


def check_placement(
    trainer: Trainer, module: CausalLMModule, data: TextDataModule, config: PruningConfig, placement: Placement
) -> None:
    """Refuse what needs the whole model in memory, where its layers are not, before any work."""
    trains = trainer.limit_train_batches != 0
    if not trains and trainer.limit_val_batches != 0:
        raise ValueError(
            f"Lightning's check of validation would run the whole model, whose layers are {placement.value}: set "
            "trainer.limit_val_batches to 0, as gqaprune prune does"
        )
    for name, group, is_used in (
        ("calibration", data.calibration, module.plan is None),
        ("training", data.training, trains),
    ):
        if is_used and (windows := group.sampled_windows):
            raise ValueError(
                f"data.{name}.sampled_windows {windows} needs the whole model in memory, which {placement.value} "
                "avoids: set it to 0 and take text from corpora"
            )
    if module.plan is None:
        check_goes_by_layer(config, placement)


def list_doubts(trainer: Trainer, module: CausalLMModule, data: TextDataModule, config: PruningConfig) -> list[str]:
    """What is allowed and hardly meant, in sentences."""
    doubts = []
    if trainer.strategy.root_device.type == "cpu" and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        doubts.append(f"a device stands idle, {device}: set trainer.accelerator to auto to use it")
    names = [corpus.name for corpus in data.corpora["calibration"]]
    is_demo = module.source.pretrained == EMBEDDED_MODEL
    if module.plan is None and config.needs_text and not is_demo and names == [EMBEDDED]:
        doubts.append(
            "the model is calibrated on Python's help alone, which is there for the demo: name text like that which it "
            "is to be good at by data.calibration.corpora, and add its own by data.calibration.sampled_windows"
        )
    return doubts
