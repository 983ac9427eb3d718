"""The loop that all criteria with a backward pass share: accumulate micro-batches, check losses, sum over ranks."""

from abc import abstractmethod
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from gqaprune.common.console import track
from gqaprune.common.distributed import is_true_anywhere, sum_across_ranks
from gqaprune.models.gates import freeze_parameters
from gqaprune.placement.layer_store import find_store
from gqaprune.plan import BlockKey
from gqaprune.scoring.criteria.base import Criterion, Scores


class BackwardCriterion(Criterion):
    """Adds to float64 `sums` over accumulations: the micro-batches that one optimizer step would use together."""

    sums: dict[BlockKey, Tensor]

    @abstractmethod
    def prepare(self) -> AbstractContextManager[object]:
        """Return a context in which batches are added; parameters are frozen when it is entered."""

    @abstractmethod
    def add(self, input_ids: Tensor, ends_accumulation: bool) -> Tensor:
        """Run one micro-batch forward and backward.

        Args:
            input_ids: token ids, `[batch, tokens]`.
            ends_accumulation: whether it is the last micro-batch of its accumulation.

        Returns:
            Mean loss of each sample in nats per token, `[batch]`.
        """

    def finish(self, sums: dict[BlockKey, Tensor]) -> Scores:
        """Turn the sums of all ranks into scores."""
        return {key: total.cpu() for key, total in sums.items()}

    def score(self) -> Scores:
        """Add this rank's batches, then sum over ranks."""
        run, calibration, overflow = self.run, self.run.calibration, ""
        with freeze_parameters(run.model), self.prepare():
            for index in track(calibration.own_batches, run.name, "batches"):
                input_ids = calibration.batches[index].to(run.device)
                losses_B = self.add(input_ids, calibration.ends_accumulation(index))
                if not torch.isfinite(losses_B).all():
                    overflow = overflow or f"batch {index}"
                    if find_store(run.model).is_in_memory:  # with shards, other ranks would wait for this one
                        break
        if is_true_anywhere(bool(overflow), run.device):
            raise ValueError(
                f"the loss of calibration {overflow or 'text on another rank'} is not finite: the model's activations "
                f"overflow (it computes in {run.model.dtype}); load it with dtype bfloat16 or float32"
            )
        return self.finish(sum_across_ranks(self.sums))
