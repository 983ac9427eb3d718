"""Losses that are not finite: noted without a look at each, described by the first."""

from pathlib import Path

import pytest
import torch

from gqaprune.training.loss_watch import LossWatch


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_first_loss_that_is_not_finite_is_described_with_its_place(bad: float, tmp_path: Path) -> None:
    losses = LossWatch()
    assert not losses.is_bad
    for batch, loss in enumerate((1.0, bad, 2.0, float("nan"))):
        losses.note(torch.tensor(loss, requires_grad=True), step=batch // 2, batch=batch)
        assert losses.is_bad.dtype == torch.long and int(losses.is_bad) == (batch > 0)
    assert losses.describe(None, [tmp_path], "run") == (
        f"the training loss is {bad} at step 0, batch 1: lower the learning rate, clip gradients, or train in bfloat16 "
        "or float32; no checkpoint with finite weights was written"
    )
    assert "at step 0, batch 1, on rank 3: lower" in losses.describe(3, [tmp_path], "run")


def test_noting_losses_does_not_look_at_their_values() -> None:
    """On a device each look would wait for all work before it; `meta` tensors have no values to look at."""
    losses = LossWatch()
    for batch in range(3):
        losses.note(torch.zeros((), device="meta"), 0, batch)
    assert losses.is_bad.is_meta
