"""All private parts of Lightning and jsonargparse that gqaprune uses; they are why `lightning` has an upper bound.

Each has a test that fails if a new version moves it. The only other one is `LightningCLI._parse_ckpt_path`, which has
to be overridden in the CLI's class. Lightning is imported for its types only, so that the core can use this file
without it.
"""

from __future__ import annotations

import inspect
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
"""Functions that replace modules' `configure_model` until they are called."""

SHARDED = "meta.pt"
"""The file that Lightning writes last into the folder of a sharded checkpoint."""
TRAINING_STATE = "callbacks"
"""Key of checkpoints with a training state, in one file or in shards; checkpoints of weights alone lack it."""
HYPER_PARAMETERS = "hyper_parameters"
"""Key of a checkpoint that has the module's hyperparameters."""
WEIGHTS = "state_dict"
"""Key of a checkpoint, in one file, that has the module's weights."""
ALWAYS = frozenset({"epoch", "global_step", "loops", "pytorch-lightning_version"})
"""Keys of every checkpoint, in one file or in shards."""


def get_subcommand_parsers(cli: LightningCLI) -> dict[str, LightningArgumentParser]:
    """Return the parsers of a CLI's commands by name, once `setup_parser` has made them."""
    return cli._subcommand_parsers


def add_subcommand(cli: LightningCLI, name: str, parser: LightningArgumentParser, help: str) -> None:
    """Add a command to a CLI that has some already."""
    assert cli.parser._subcommands_action is not None
    cli.parser._subcommands_action.add_subcommand(name, parser, help=help)


def describe_subcommands(cli: LightningCLI, descriptions: Mapping[str, str]) -> None:
    """Replace the descriptions of a CLI's commands in `--help`."""
    assert cli.parser._subcommands_action is not None
    for choice in cli.parser._subcommands_action._choices_actions:
        choice.help = descriptions[choice.dest]


def get_setting(cli: LightningCLI, name: str) -> Any:
    """Return a setting of the command that a CLI runs, with the classes that it names built."""
    return cli._get(cli.config_init, name)


def reserve_version(logger: TensorBoardLogger) -> None:
    """Make the folder of a logger that numbers its runs, with the next number that no other run has taken."""
    while True:
        try:
            Path(logger.log_dir).mkdir(parents=True)
            return
        except FileExistsError:
            logger._version = int(logger.version) + 1


def unwrap_factory(factory: Callable[..., T]) -> Callable[..., T]:
    """Return an optimizer factory as class and arguments, without jsonargparse's parser, which cannot be copied."""
    if isinstance(factory, partial) and factory.args and isinstance(factory.args[-1], type):
        return partial(factory.args[-1], **factory.keywords)
    return factory


def find_trainer(module: LightningModule) -> Trainer | None:
    """Return the trainer of a module; None outside of a run, where `module.trainer` raises an error."""
    return module._trainer


def get_parallel_sizes(strategy: ModelParallelStrategy) -> tuple[int | str, int | str]:
    """Return the numbers of devices that share the data and each tensor, or `auto`."""
    return strategy._data_parallel_size, strategy._tensor_parallel_size


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Set the number of devices that share the data, before the strategy starts processes."""
    strategy._data_parallel_size = size


def count_loaded_batches(trainer: Trainer) -> float:
    """Count the training batches of an epoch from the loader, infinite if it has no length; sets it up if needed."""
    trainer.fit_loop.setup_data()
    return trainer.num_training_batches


def get_train_batches(trainer: Trainer) -> Iterable[Any]:
    """Return the training batches of a run that begins, from the first loader if there are several.

    Raises:
        ValueError: if there are none.
    """
    source = trainer.fit_loop._data_source
    loaders = source.dataloader() if source.instance is not None and source.is_defined() else None
    while isinstance(loaders, (list, tuple, dict)):
        loaders = next(iter(loaders.values() if isinstance(loaders, dict) else loaders), None)
    if loaders is None:
        raise ValueError(
            "there is no text to calibrate on: pass TaylorPruning(calibration=...), a data module with "
            "calibration_batches(), or training batches"
        )
    return cast("Iterable[Any]", loaders)


def find_resumed_checkpoint(trainer: Trainer) -> str | Path | None:
    """Return the checkpoint that a run resumes from, before any of it is restored; None if it starts anew.

    Until Lightning restores it, after `setup`, its path is only an argument of the running `Trainer._run`.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            return cast("str | Path | None", frame.f_locals.get("ckpt_path"))
        frame = frame.f_back
    return trainer.ckpt_path


def reads_from_module(trainer: Trainer) -> bool:
    """Return whether the module itself provides the training batches; it may not be set up yet."""
    return trainer.fit_loop._data_source.instance is trainer.lightning_module


def run_after_configuring(module: LightningModule, do: Callable[[], None]) -> None:
    """Call a function once, after a module has built its model and before a strategy wraps it."""
    if vars(module).get("configure_model") in _WAITING:  # left by a fit that failed
        del module.configure_model
    configure = module.configure_model

    def configure_model() -> None:
        vars(module).pop("configure_model", None)
        configure()
        do()

    _WAITING.add(configure_model)
    module.configure_model = configure_model  # type: ignore[method-assign]


def unscales_gradients(optimizer: Optimizer) -> bool:
    """Return whether an optimizer unscales float16 gradients in its step, so that Lightning refuses to clip before."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def set_validation_interval(trainer: Trainer, batches: int) -> None:
    """Make a trainer validate after this many training batches; called within an epoch."""
    trainer.val_check_batch = batches


def read_epoch(checkpoint: Mapping[str, Any]) -> int:
    """Return the number of epochs that were finished when a checkpoint was written."""
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def go_back_by_batches(checkpoint: dict[str, Any], count: int) -> None:
    """Make a checkpoint resume some training batches earlier in its epoch."""
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_loop.batch_progress"]
    for span in ("current", "total"):
        place = progress[span]["ready"] - count
        progress[span] |= dict.fromkeys(("ready", "started", "processed", "completed"), place)
    for loader in loops["state_dict"].get("combined_loader", ()):
        loader["yielded"] -= count  # state of the loader in `datamodules/loaders.py`


def count_batches_done(checkpoint: Mapping[str, Any]) -> int:
    """Count the training batches of its epoch that a checkpoint has trained on; 0 at the epoch's end."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return 0 if progress["is_last_batch"] else int(progress["current"]["ready"])


def take_over_signals(trainer: Trainer) -> None:
    """Turn off Lightning's signal handlers, which wait for other ranks, and its broadcast in each micro-batch."""
    trainer._signal_connector.register_signal_handlers = _do_nothing  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _do_nothing  # type: ignore[method-assign]


def take_over_child_processes(trainer: Trainer) -> list[subprocess.Popen[Any]]:
    """Return the ranks that Lightning's launcher started, and stop it from killing them when one of them fails."""
    launcher = trainer.strategy.launcher
    children: list[subprocess.Popen[Any]] = list(getattr(launcher, "procs", ()))
    if not all(isinstance(child, subprocess.Popen) for child in children):
        return []  # `ddp_spawn` looks after its processes itself
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]
    return children


def wrap_restoring(trainer: Trainer, wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Wrap each of a trainer's methods that restore a checkpoint's content."""
    for name in ("_restore_modules_and_callbacks", "restore_training_state"):
        setattr(trainer._checkpoint_connector, name, wrap(getattr(trainer._checkpoint_connector, name)))


def find_requeue_signal(trainer: Trainer) -> int | None:
    """Return the signal by which SLURM asks a job to requeue itself; None elsewhere."""
    environment = trainer._accelerator_connector.cluster_environment
    is_asked = getattr(environment, "auto_requeue", False)
    return getattr(environment, "requeue_signal", None) if is_asked else None


def is_validation_due(trainer: Trainer) -> bool:
    """Return whether a validation follows the training batch that has just ended."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def is_last_step(trainer: Trainer) -> bool:
    """Return whether the training batch that has just ended is the last one of its epoch, or of training."""
    return bool(trainer.fit_loop.epoch_loop._is_training_done)


def put_before_validation(checkpoint: dict[str, Any]) -> None:
    """Make a checkpoint from within a validation resume at that validation's first batch."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    done = progress["total"]["completed"]
    progress["total"] |= {"ready": done + 1, "started": done + 1, "processed": done}  # a validation that is not over
    progress["current"] |= dict.fromkeys(progress["current"], 0)
    progress["is_last_batch"] = False


def _do_nothing() -> None:
    pass
