"""The order of a trainer's callbacks: what copies the model follows pruning, what saves it follows what changes it."""

from enum import IntEnum

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.cli import SaveConfigCallback


class Phase(IntEnum):
    """When a callback's hooks run, beside those of the others; gqaprune's have it as the attribute `phase`."""

    SETTINGS = 0
    """Lightning's, first of all: what they refuse is refused before work."""
    WORK = 1
    """Changes the model in `setup`; callbacks of unknown classes before the export, too."""
    COPIES = 2
    """Copies or masks the model in `setup`, and changes it when training ends."""
    EXPORT = 3
    """Saves and measures what training ends with; callbacks of unknown classes after the export, too."""
    CHECKPOINTS = 4
    """Lightning's own, which it keeps last."""


def order_callbacks(trainer: Trainer) -> None:
    """Put a trainer's callbacks into the order of their phases; within one they keep their order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = sort_callbacks(trainer)


def sort_callbacks(trainer: Trainer) -> list[Callback]:
    """A trainer's callbacks in the order of their phases."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    phases = [getattr(callback, "phase", None) for callback in callbacks]
    export = phases.index(Phase.EXPORT) if Phase.EXPORT in phases else len(phases)
    places = [
        (phase if phase is not None else _find_phase(callback, is_after_export=index > export), index)
        for index, (callback, phase) in enumerate(zip(callbacks, phases, strict=True))
    ]
    return [callbacks[index] for _, index in sorted(places)]


def check_copies_follow(trainer: Trainer, pruning: Callback) -> None:
    """Refuse a callback that has copied the model already when it is pruned, where Lightning's order is as given.

    Raises:
        ValueError: naming it.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks[: callbacks.index(pruning)]:
        if copies_model(callback):
            name = type(callback).__name__
            raise ValueError(f"{name} copies the model before it is pruned: list it after {type(pruning).__name__}")


def _find_phase(callback: Callback, is_after_export: bool) -> Phase:
    if copies_model(callback):
        return Phase.COPIES
    if isinstance(callback, Checkpoint):
        return Phase.CHECKPOINTS
    if is_of_lightning(callback) and not isinstance(callback, SaveConfigCallback):  # which writes in `setup`
        return Phase.SETTINGS
    return Phase.EXPORT if is_after_export else Phase.WORK


def copies_model(callback: Callback) -> bool:
    """Whether a callback of Lightning's copies or masks the weights in `setup`, and changes them when training ends."""
    return isinstance(callback, (StochasticWeightAveraging, WeightAveraging, ModelPruning))


def is_of_lightning(callback: Callback) -> bool:
    """Whether a callback's class is one of Lightning's; others may log and change what they like."""
    return type(callback).__module__.startswith("lightning.")
