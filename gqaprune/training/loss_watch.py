"""Detect losses that are not finite, once per optimizer step, because each check waits for the device."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from gqaprune.training.resume import find_checkpoint


class LossWatch:
    """Records the first micro-batch whose loss is not finite, on the loss's device, without waiting for it."""

    def __init__(self) -> None:
        self._first: tuple[Tensor, ...] | None = None

    @property
    def is_bad(self) -> Tensor:
        """1 if a loss was not finite, else 0: an integer on the device of the losses."""
        return torch.tensor(0) if self._first is None else self._first[0].long()

    def note(self, loss: Tensor, step: int, batch: int) -> None:
        """Record the loss of a micro-batch.

        Args:
            loss: the loss, a scalar.
            step: number of optimizer steps before it.
            batch: number of the micro-batch in the epoch.
        """
        loss = loss.detach()
        is_bad = ~torch.isfinite(loss)
        place = [torch.full_like(is_bad, number, dtype=torch.long) for number in (step, batch)]
        if self._first is not None:
            was_bad, *first = self._first
            loss, *place = (torch.where(was_bad, *pair) for pair in zip(first, [loss, *place], strict=True))
            is_bad = is_bad | was_bad
        self._first = (is_bad, loss, *place)

    def describe(self, rank: int | None, folders: Iterable[str | Path], run_id: str) -> str:
        """Describe where the loss was not finite, and what to do.

        Args:
            rank: rank of this process; None if there is only one.
            folders: folders with the run's checkpoints.
            run_id: id that its checkpoints have.
        """
        assert self._first is not None, "note() comes first"
        loss, step, batch = (part.item() for part in self._first[1:])
        place = f"step {step}, batch {batch}" + ("" if rank is None else f", on rank {rank}")
        good = find_checkpoint(folders, run_id)
        restart = f"resume with --ckpt_path {good}" if good else "no checkpoint with finite weights was written"
        return (
            f"the training loss is {loss} at {place}: lower the learning rate, clip gradients, or train in bfloat16 or "
            f"float32; {restart}"
        )
