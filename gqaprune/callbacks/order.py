"""Sort a trainer's callbacks: those that copy the model after pruning, those that save it after all changes."""

from enum import IntEnum

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import SaveConfigCallback


class Phase(IntEnum):
    """When a callback's hooks run, relative to the others'; gqaprune's callbacks set it as the attribute `phase`."""

    SETTINGS = 0
    """Lightning's callbacks, first of all: their errors are raised before any work."""
    WORK = 1
    """Changes the model in `setup`; also callbacks of unknown classes that are listed before the export."""
    COPIES = 2
    """Copies or masks the model in `setup`, and changes it when training ends."""
    EXPORT = 3
    """Saves and measures the final model; also callbacks of unknown classes that are listed after the export."""
    CHECKPOINTS = 4
    """Lightning's checkpoint callbacks, which Lightning keeps last."""


def order_callbacks(trainer: Trainer) -> None:
    """Sort a trainer's callbacks by phase in place; callbacks of the same phase keep their order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = sort_callbacks(trainer)


def sort_callbacks(trainer: Trainer) -> list[Callback]:
    """Return a trainer's callbacks, sorted by phase."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    phases = [getattr(callback, "phase", None) for callback in callbacks]
    export = phases.index(Phase.EXPORT) if Phase.EXPORT in phases else len(phases)
    places = [
        (phase if phase is not None else _find_phase(callback, is_after_export=index > export), index)
        for index, (callback, phase) in enumerate(zip(callbacks, phases, strict=True))
    ]
    return [callbacks[index] for _, index in sorted(places)]


def check_copies_follow(trainer: Trainer, pruning: Callback) -> None:
    """Raise an error if a callback that copies the model is listed before pruning; for modules of other classes.

    Raises:
        ValueError: with the callback's name and where to list it.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks[: callbacks.index(pruning)]:
        if copies_model(callback):
            name = type(callback).__name__
            raise ValueError(f"{name} copies the model before it is pruned: list {name} after {type(pruning).__name__}")


def _find_phase(callback: Callback, is_after_export: bool) -> Phase:
    if copies_model(callback):
        return Phase.COPIES
    if isinstance(callback, Checkpoint):
        return Phase.CHECKPOINTS
    if is_of_lightning(callback) and not isinstance(callback, SaveConfigCallback):  # that one writes in `setup`
        return Phase.SETTINGS
    return Phase.EXPORT if is_after_export else Phase.WORK


def copies_model(callback: Callback) -> bool:
    """Return whether a Lightning callback copies or masks the weights in `setup` and changes them after training."""
    return isinstance(callback, (StochasticWeightAveraging, WeightAveraging, ModelPruning))


def is_of_lightning(callback: Callback) -> bool:
    """Return whether a callback's class is Lightning's; callbacks of other classes may log and change anything."""
    return type(callback).__module__.startswith("lightning.")
