"""Private parts of Lightning and jsonargparse that gqaprune relies on, here alone; why `lightning` has an upper bound.

A test of each fails where a new version moves it. `LightningCLI._parse_ckpt_path`, which it calls before it builds
anything, is overridden in `cli.py` and cannot be here. Lightning is imported for its types only, so that the core can
use this file without it.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakSet

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.optim import Optimizer

T = TypeVar("T")

_WAITING: WeakSet[Callable[[], None]] = WeakSet()
"""What stands for modules' `configure_model` until it is called."""

SHARDED = "meta.pt"
"""What Lightning writes last into the folder of a sharded checkpoint."""
TRAINING_STATE = "callbacks"
"""Key that checkpoints of weights alone lack, in one file or in shards."""
HYPER_PARAMETERS = "hyper_parameters"
"""Key of a checkpoint that has the module's hyperparameters."""
WEIGHTS = "state_dict"
"""Key of a checkpoint, in one file, that has the module's weights."""
ALWAYS = frozenset({"epoch", "global_step", "loops", "pytorch-lightning_version"})
"""Keys of every checkpoint, in one file or in shards."""


def get_subcommand_parsers(cli: LightningCLI) -> dict[str, LightningArgumentParser]:
    """Parsers of a CLI's commands by name, once `setup_parser` has made them."""
    return cli._subcommand_parsers


def add_subcommand(cli: LightningCLI, name: str, parser: LightningArgumentParser, help: str) -> None:
    """Add a command to a CLI that has some already."""
    assert cli.parser._subcommands_action is not None
    cli.parser._subcommands_action.add_subcommand(name, parser, help=help)


def describe_subcommands(cli: LightningCLI, descriptions: Mapping[str, str]) -> None:
    """Replace what `--help` says of each command of a CLI."""
    assert cli.parser._subcommands_action is not None
    for choice in cli.parser._subcommands_action._choices_actions:
        choice.help = descriptions[choice.dest]


def get_setting(cli: LightningCLI, name: str) -> Any:
    """A setting of the command that a CLI runs, with classes built where it names some."""
    return cli._get(cli.config_init, name)


def reserve_version(logger: TensorBoardLogger) -> None:
    """Make the folder of a logger that numbers its runs, with the next number that no other run has taken since."""
    while True:
        try:
            Path(logger.log_dir).mkdir(parents=True)
            return
        except FileExistsError:
            logger._version = int(logger.version) + 1


def unwrap_factory(factory: Callable[..., T]) -> Callable[..., T]:
    """A factory of optimizers as plain class and arguments, without jsonargparse's parser, which cannot be copied."""
    if isinstance(factory, partial) and factory.args and isinstance(factory.args[-1], type):
        return partial(factory.args[-1], **factory.keywords)
    return factory


def find_trainer(module: LightningModule) -> Trainer | None:
    """The trainer of a module; null outside of a run, where `module.trainer` is an error."""
    return module._trainer


def get_parallel_sizes(strategy: ModelParallelStrategy) -> tuple[int | str, int | str]:
    """Devices over which data and tensors are split, or `auto`."""
    return strategy._data_parallel_size, strategy._tensor_parallel_size


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Set the number of devices over which data is split, before the strategy starts processes."""
    strategy._data_parallel_size = size


def count_loaded_batches(trainer: Trainer) -> int:
    """Training batches of an epoch, from the loader, which Lightning may not have set up yet."""
    trainer.fit_loop.setup_data()
    return int(trainer.num_training_batches)


def get_train_batches(trainer: Trainer) -> Iterable[Any]:
    """The training batches of a run that begins, of the first loader where there are several.

    Raises:
        ValueError: if there are none.
    """
    source = trainer.fit_loop._data_source
    loaders = source.dataloader() if source.instance is not None and source.is_defined() else None
    while isinstance(loaders, (list, tuple, dict)):
        loaders = next(iter(loaders.values() if isinstance(loaders, dict) else loaders), None)
    if loaders is None:
        raise ValueError(
            "there is no text to calibrate on: give TaylorPruning(calibration=...), a data module with "
            "calibration_batches(), or training batches"
        )
    return cast("Iterable[Any]", loaders)


def reads_from_module(trainer: Trainer) -> bool:
    """Whether the training batches of a run that begins are those of the module itself, which may not be set up yet."""
    return trainer.fit_loop._data_source.instance is trainer.lightning_module


def run_after_configuring(module: LightningModule, do: Callable[[], None]) -> None:
    """Do something once, when a module has been set up and has built its model, before a strategy gets hold of it."""
    if vars(module).get("configure_model") in _WAITING:  # of a fit that failed before
        del module.configure_model
    configure = module.configure_model

    def configure_model() -> None:
        vars(module).pop("configure_model", None)
        configure()
        do()

    _WAITING.add(configure_model)
    module.configure_model = configure_model  # type: ignore[method-assign]


def unscales_gradients(optimizer: Optimizer) -> bool:
    """Whether an optimizer does the work of float16's scaler in its step, so that Lightning refuses to clip before."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def set_validation_interval(trainer: Trainer, batches: int) -> None:
    """Let a trainer validate after every so many training batches, from within an epoch."""
    trainer.val_check_batch = batches


def read_epoch(checkpoint: Mapping[str, Any]) -> int:
    """Epochs that were finished when a checkpoint was written."""
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def go_back_by_batches(checkpoint: dict[str, Any], count: int) -> None:
    """Let a checkpoint resume some training batches earlier in its epoch."""
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_loop.batch_progress"]
    for span in ("current", "total"):
        place = progress[span]["ready"] - count
        progress[span] |= dict.fromkeys(("ready", "started", "processed", "completed"), place)
    for loader in loops["state_dict"].get("combined_loader", ()):
        loader["yielded"] -= count  # of `datamodules/loaders.py`


def count_batches_done(checkpoint: Mapping[str, Any]) -> int:
    """Training batches of its epoch that a checkpoint has behind it; 0 at the epoch's end."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return 0 if progress["is_last_batch"] else int(progress["current"]["ready"])


def take_over_signals(trainer: Trainer) -> None:
    """Keep Lightning's signal handlers out, which wait for other ranks, and its word of them in each micro-batch."""
    trainer._signal_connector.register_signal_handlers = _do_nothing  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _do_nothing  # type: ignore[method-assign]


def take_over_child_processes(trainer: Trainer) -> list[subprocess.Popen[Any]]:
    """The other ranks that Lightning's launcher started from this process, which it kills no more where one fails."""
    launcher = trainer.strategy.launcher
    children: list[subprocess.Popen[Any]] = list(getattr(launcher, "procs", ()))
    if not all(isinstance(child, subprocess.Popen) for child in children):
        return []  # of `ddp_spawn`, which looks after them itself
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]
    return children


def wrap_restoring(trainer: Trainer, wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Put something around each of a trainer's calls that take over what a checkpoint holds."""
    for name in ("_restore_modules_and_callbacks", "restore_training_state"):
        setattr(trainer._checkpoint_connector, name, wrap(getattr(trainer._checkpoint_connector, name)))


def find_requeue_signal(trainer: Trainer) -> int | None:
    """The signal by which SLURM asks a job to put itself back into the queue; None elsewhere."""
    environment = trainer._accelerator_connector.cluster_environment
    is_asked = getattr(environment, "auto_requeue", False)
    return getattr(environment, "requeue_signal", None) if is_asked else None


def is_validation_due(trainer: Trainer) -> bool:
    """Whether a validation follows the training batch that has just ended."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def is_last_step(trainer: Trainer) -> bool:
    """Whether the training batch that has just ended is the last one of its epoch, or of the training."""
    return bool(trainer.fit_loop.epoch_loop._is_training_done)


def put_before_validation(checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint from within a validation resume at that validation's first batch."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    done = progress["total"]["completed"]
    progress["total"] |= {"ready": done + 1, "started": done + 1, "processed": done}  # which Lightning takes as halfway
    progress["current"] |= dict.fromkeys(progress["current"], 0)
    progress["is_last_batch"] = False


def _do_nothing() -> None:
    pass
