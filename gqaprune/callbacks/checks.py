"""Check for settings that exclude one another, before any work."""

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
    """Raise an error before any work if several rounds are asked for and the model cannot be cut between steps."""
    rounds = module.recovery.rounds
    if rounds == 1:
        return
    is_whole = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
    if not is_whole or isinstance(trainer.strategy, DeepSpeedStrategy):
        name = type(trainer.strategy).__name__
        raise ValueError(
            f"recovery.rounds {rounds} cuts the whole model between steps, but {name} shards it: set recovery.rounds "
            "to 1, or trainer.strategy to ddp"
        )
    is_gated = config.uses_damage_curves and not config.sees_repair
    if is_gated or config.swaps.generations:
        name = "damage: gated" if is_gated else "swaps.generations"
        raise ValueError(
            f"{name} measures the cut that spends the whole budget, but recovery.rounds {rounds} spends it in parts: "
            "set recovery.rounds to 1"
        )


def check_schedule(trainer: Trainer, module: CausalLMModule) -> None:
    """Raise an error before any work if the schedule or the rounds need a number of steps that is not known."""
    schedule = module.optimizer_config.schedule
    is_endless = trainer.max_epochs == -1 and trainer.max_steps == -1 and trainer.limit_train_batches != 0
    if is_endless and (schedule != "constant" or module.recovery.rounds > 1):
        raise ValueError(
            f"model.schedule {schedule} and recovery.rounds {module.recovery.rounds} need the number of steps, and "
            "trainer.max_time alone does not set it: set trainer.max_steps or trainer.max_epochs as well, or set "
            "model.schedule to constant and recovery.rounds to 1"
        )


def check_teacher(trainer: Trainer, module: CausalLMModule, config: PruningConfig) -> None:
    """Raise an error before any work if the model cannot learn from the teacher."""
    settings = module.recovery
    if not settings.distills or trainer.limit_train_batches == 0:
        return
    student_source, source = module.source.pretrained, find_teacher(module.source, module.recovery).pretrained
    is_itself = source == student_source and (module.plan is None or module.plan.removes_nothing)
    if is_itself and not config.removes_something:
        raise ValueError(
            f"recovery.mode {settings.mode} would train {source} to imitate itself, because this run does not prune "
            "it: set model.recovery.teacher to the dense model"
        )
    student = module.source.read_config().get_text_config()
    teacher = load_config(source, module.source.trust_remote_code).get_text_config()
    names = ["vocab_size", *(["hidden_size"] if settings.hidden_weight else [])]
    for name in names:
        expected, given = getattr(student, name), getattr(teacher, name)
        if expected != given:
            raise ValueError(
                f"the teacher {source} has {name} {given}, the student {student_source} has {expected}: use a teacher "
                f"with {name} {expected}"
            )
    if settings.teacher_top_k:
        check_top_k(settings.teacher_top_k, teacher.vocab_size)
        check_can_be_folder(CACHE_FOLDER)
    check_context(teacher, get_parts(trainer, module)[1].training.window, f"data.training.window for {source}")
    layers = min(student.num_hidden_layers, teacher.num_hidden_layers)
    if settings.hidden_weight and max(settings.hidden_layers or [0]) >= layers:
        raise ValueError(
            f"recovery.hidden_layers must be in 0..{layers - 1}, got {settings.hidden_layers}; try [{layers - 1}]"
        )


def check_adapters(trainer: Trainer, module: CausalLMModule) -> None:
    """Raise an error before any work if an adapter's target is not a projection of the model."""
    if module.recovery.uses_lora and trainer.limit_train_batches != 0:
        source = module.source
        check_targets(source.read_config().get_text_config(), module.recovery)


def check_compile(trainer: Trainer, module: CausalLMModule) -> None:
    """Raise an error before any work if layers cannot be compiled, by a sharding strategy or without a compiler."""
    if module.layer_compiler.is_on and isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy)):
        raise ValueError(
            f"model.compile compiles whole layers, but {type(trainer.strategy).__name__} shards them: set "
            "model.compile to false, or trainer.strategy to ddp or auto"
        )
    if trainer.limit_train_batches != 0:
        module.layer_compiler.rehearse(trainer.strategy.root_device)


def check_offload(trainer: Trainer, module: CausalLMModule) -> None:
    """Raise an error before any work if a setting cannot be combined with layers on disk."""
    if trainer.limit_train_batches != 0:
        raise ValueError(
            f"pruning.offload keeps the layers on disk, where recovery.mode {module.recovery.mode} cannot train them: "
            "use gqaprune prune, or set recovery.mode to none, and train the checkpoint afterwards"
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise ValueError(
            f"pruning.offload needs a single device, got {type(trainer.strategy).__name__}: set trainer.devices to 1 "
            "and trainer.strategy to auto"
        )


def check_sharded(trainer: Trainer) -> None:
    """Raise an error before any work if the strategy has no devices to shard layers over."""
    strategy, processes = trainer.strategy, trainer.world_size
    uses_all = isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["data_parallel"].size() == processes
    if not uses_all:
        raise ValueError(
            f"pruning.sharded needs a ModelParallelStrategy that shards over all {processes} processes, got "
            f"{type(strategy).__name__}: set trainer.strategy as in configs/strategy/fsdp2.yaml, with "
            f"data_parallel_size {processes} and tensor_parallel_size 1"
        )


def check_placement(
    trainer: Trainer, module: CausalLMModule, data: TextDataModule, config: PruningConfig, placement: Placement
) -> None:
    """Raise an error before any work if a setting needs the whole model in memory and its layers are elsewhere."""
    trains = trainer.limit_train_batches != 0
    if not trains and trainer.limit_val_batches != 0:
        raise ValueError(
            "Lightning's sanity check of validation would run the whole model, but "
            f"pruning.{placement.value} keeps its layers out of memory: set trainer.limit_val_batches to 0, as "
            "gqaprune prune does"
        )
    for name, group, is_used in (
        ("calibration", data.calibration, module.plan is None),
        ("training", data.training, trains),
    ):
        if is_used and (windows := group.sampled_windows):
            raise ValueError(
                f"data.{name}.sampled_windows {windows} needs the whole model in memory, but pruning.{placement.value} "
                f"keeps its layers out of it: set data.{name}.sampled_windows to 0 and use text of data.{name}.corpora"
            )
    if module.plan is None:
        check_goes_by_layer(config, placement)


def list_doubts(trainer: Trainer, module: CausalLMModule, data: TextDataModule, config: PruningConfig) -> list[str]:
    """List warnings, each a sentence, about settings that are allowed but probably not intended."""
    doubts = []
    if trainer.strategy.root_device.type == "cpu" and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        doubts.append(f"the run uses the CPU although {device} is available: set trainer.accelerator to auto to use it")
    names = [corpus.name for corpus in data.corpora["calibration"]]
    is_demo = module.source.pretrained == EMBEDDED_MODEL
    if module.plan is None and config.needs_text and not is_demo and names == [EMBEDDED]:
        doubts.append(
            "the only calibration text is the embedded demo text (Python's help): set data.calibration.corpora to text "
            "like the text that the model will be used on; data.calibration.sampled_windows adds text that the model "
            "writes itself"
        )
    return doubts
