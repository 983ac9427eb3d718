"""Criteria from gradients of unit gates: one backward pass and no weight gradients.

Axes in tensor names: B samples, T tokens, U units.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gqaprune.common.distributed import get_rank_and_world_size
from gqaprune.common.precision import find_double_device, sum_in_double, to_double
from gqaprune.models.architecture import get_layers
from gqaprune.models.gates import Gates, compute_gate_gradients
from gqaprune.placement.layer_store import find_store
from gqaprune.scoring.criteria.backward import BackwardCriterion
from gqaprune.scoring.criteria.base import ScoringConfig, ScoringRun, cut_pieces


class GateCriterion(BackwardCriterion):
    """Sums gate gradients."""

    runs_held = True

    def __init__(self, run: ScoringRun, scoring: ScoringConfig) -> None:
        super().__init__(run, scoring)
        self.sums = {
            block.key: torch.zeros(block.units, dtype=torch.float64, device=find_double_device(run.device))
            for block in run.blocks
        }

    @property
    def passes_tokens_once(self) -> bool:
        """Whether activations are not recomputed. If they are, every token runs again before its backward pass."""
        return find_store(self.run.model).is_in_memory and not self.run.model.is_activation_checkpointing

    def count_kept_bytes(self) -> int:
        """Count the bytes of the inputs and outputs of all projections, for the tokens of one forward."""
        model = self.run.model
        tokens = max(self._cut_passes(batch_BT)[0].numel() for batch_BT in self.run.calibration.batches)
        linears = [module for module in get_layers(model).modules() if isinstance(module, nn.Linear)]
        itemsize: int = model.dtype.itemsize
        return tokens * itemsize * sum(linear.in_features + linear.out_features for linear in linears)

    @abstractmethod
    def add_gradients(self, gradients_BU: Gates) -> None:
        """Add the gate gradients of some samples of one micro-batch, each `[B, U]`."""

    def end_accumulation(self) -> None:
        """Finish an accumulation."""

    @contextmanager
    def prepare(self) -> Iterator[None]:
        """Load each layer only while it runs. Gates are added for each batch, not here."""
        store = find_store(self.run.model)
        with store.hold_running_layers():
            yield
            if not store.is_in_memory:
                self._match_passes()

    def _match_passes(self) -> None:
        """Run as many passes as the rank with the most: all ranks have to gather sharded layers together."""
        run, (this_rank, world_size) = self.run, get_rank_and_world_size()
        batches = run.calibration.batches
        counts = [
            sum(len(self._cut_passes(batches[index])) for index in run.calibration.list_batches(rank, world_size))
            for rank in range(world_size)
        ]
        any_BT = batches[0][:1].to(run.device)
        for _ in range(max(counts) - counts[this_rank]):
            compute_gate_gradients(run.model, run.blocks, any_BT)

    def add(self, input_ids: Tensor, ends_accumulation: bool) -> Tensor:
        """Add the gate gradients of one micro-batch, a few samples at a time."""
        losses = []
        for pass_BT in self._cut_passes(input_ids):
            gradients_BU, losses_B = compute_gate_gradients(self.run.model, self.run.blocks, pass_BT)
            self.add_gradients(gradients_BU)
            losses.append(losses_B)
        if ends_accumulation:
            self.end_accumulation()
        return torch.cat(losses)

    def _cut_passes(self, input_ids: Tensor) -> Sequence[Tensor]:
        """Cut a micro-batch, `[batch, tokens]`, into pieces, each for one forward.

        A model that recomputes activations trades time for memory, so it gets one sample at a time.
        """
        return input_ids.split(1) if self.run.model.is_activation_checkpointing else cut_pieces(input_ids)


class GateFisher(GateCriterion):
    """`Σ_n g_n²` over samples n: the diagonal Fisher information of the gate.

    Unit: (nats per token)², summed over samples. Source: the masks' Fisher information of Kwon et al. 2022,
    arXiv 2204.09656.
    """

    def add_gradients(self, gradients_BU: Gates) -> None:
        """Add each sample's squared gradient."""
        for key, gradient_BU in gradients_BU.items():
            self.sums[key] += to_double(gradient_BU).square().sum(0)


class GateTaylor(GateCriterion):
    """`Σ_a |Σ_{n∈a} g_n|` over accumulations a of samples n: the first-order Taylor term.

    Unit: nats per token, summed over samples. The absolute value is taken per accumulation, within which samples of
    opposite sign cancel, as in a training step. Source: Molchanov et al. 2019, arXiv 1906.10771; for LLMs,
    LLM-Pruner's "vectorized" Taylor, arXiv 2305.11627.
    """

    def __init__(self, run: ScoringRun, scoring: ScoringConfig) -> None:
        super().__init__(run, scoring)
        self.accumulated_U = {key: torch.zeros_like(total) for key, total in self.sums.items()}

    def add_gradients(self, gradients_BU: Gates) -> None:
        """Add the micro-batch to the accumulation."""
        for key, gradient_BU in gradients_BU.items():
            self.accumulated_U[key] += sum_in_double(gradient_BU, 0)

    def end_accumulation(self) -> None:
        """Add the accumulation's absolute gradient, and start a new accumulation."""
        for key, accumulated_U in self.accumulated_U.items():
            self.sums[key] += accumulated_U.abs()
            accumulated_U.zero_()
