"""The loop that criteria with a backward pass share: accumulated micro-batches, losses checked, sums over ranks."""

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
    """Adds up float64 `sums` over accumulations, the micro-batches that an optimizer step would see together."""

    sums: dict[BlockKey, Tensor]

    @abstractmethod
    def prepare(self) -> AbstractContextManager[object]:
        """What has to last while batches are added; parameters are frozen when it begins."""

    @abstractmethod
    def add(self, input_ids: Tensor, ends_accumulation: bool) -> Tensor:
        """Take one micro-batch.

        Args:
            input_ids: tokens `[batch, tokens]`.
            ends_accumulation: whether it is the last of its accumulation.

        Returns:
            Mean loss of each sample in nats per token, `[batch]`.
        """

    def finish(self, sums: dict[BlockKey, Tensor]) -> Scores:
        """Turn the sums of all ranks into scores."""
        return {key: total.cpu() for key, total in sums.items()}

    def score(self) -> Scores:
        """Add this rank's batches, then the ranks."""
        run, calibration, overflow = self.run, self.run.calibration, ""
        with freeze_parameters(run.model), self.prepare():
            for index in track(calibration.own_batches, run.name, "batches"):
                input_ids = calibration.batches[index].to(run.device)
                losses_B = self.add(input_ids, calibration.ends_accumulation(index))
                if not torch.isfinite(losses_B).all():
                    overflow = overflow or f"batch {index}"
                    if find_store(run.model).is_in_memory:  # else other ranks wait for this one's shards
                        break
        if is_true_anywhere(bool(overflow), run.device):
            raise ValueError(
                f"the loss of calibration {overflow or 'text on another rank'} is not finite: the model's activations "
                f"overflow (it computes in {run.model.dtype}); load it with dtype bfloat16 or float32"
            )
        return self.finish(sum_across_ranks(self.sums))
