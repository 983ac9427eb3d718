"""Private parts of Lightning and jsonargparse that gqaprune relies on, here alone; why `lightning` has an upper bound.

A test of each fails where a new version moves it. `LightningCLI._parse_ckpt_path`, which it calls before it builds
anything, is overridden in `cli.py` and cannot be here. Lightning is imported for its types only, so that the core can
use this file without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.optim import Optimizer

T = TypeVar("T")

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
