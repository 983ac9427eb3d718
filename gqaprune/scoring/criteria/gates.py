"""Criteria from unit gates: one backward pass, no weight gradient. Axes in tensor names: B samples, U units."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gqaprune.common.distributed import get_rank_and_world_size
from gqaprune.models.gates import Gates, compute_gate_gradients
from gqaprune.placement.layer_store import find_store
from gqaprune.scoring.criteria.backward import BackwardCriterion
from gqaprune.scoring.criteria.base import ScoringConfig, ScoringRun

PASS_TOKENS = 1024
"""Tokens whose activations are held at once: samples do not touch each other."""


class GateCriterion(BackwardCriterion):
    """Adds up gate gradients."""

    runs_held = True

    def __init__(self, run: ScoringRun, scoring: ScoringConfig) -> None:
        super().__init__(run, scoring)
        self.sums = {
            block.key: torch.zeros(block.units, dtype=torch.float64, device=run.device) for block in run.blocks
        }

    @abstractmethod
    def add_gradients(self, gradients_BU: Gates) -> None:
        """Take the gate gradients of some samples of one micro-batch."""

    def end_accumulation(self) -> None:
        """Close an accumulation."""

    @contextmanager
    def prepare(self) -> Iterator[None]:
        """Hold each layer while it runs; gates come and go with each batch."""
        store = find_store(self.run.model)
        with store.hold_running_layers():
            yield
            if not store.is_in_memory:
                self._keep_pace()

    def _keep_pace(self) -> None:
        """Make the passes that others make more of: where layers are sharded, all ranks hold them together."""
        run, (own, world_size) = self.run, get_rank_and_world_size()
        batches = run.calibration.batches
        counts = [
            sum(len(self._cut_passes(batches[index])) for index in run.calibration.list_batches(rank, world_size))
            for rank in range(world_size)
        ]
        any_BT = batches[0][:1].to(run.device)
        for _ in range(max(counts) - counts[own]):
            compute_gate_gradients(run.model, run.blocks, any_BT)

    def add(self, input_ids: Tensor, ends_accumulation: bool) -> Tensor:
        """Take the gate gradients of one micro-batch, a few of its samples at a time."""
        losses = []
        for pass_BT in self._cut_passes(input_ids):
            gradients_BU, losses_B = compute_gate_gradients(self.run.model, self.run.blocks, pass_BT)
            self.add_gradients(gradients_BU)
            losses.append(losses_B)
        if ends_accumulation:
            self.end_accumulation()
        return torch.cat(losses)

    def _cut_passes(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """A micro-batch, `[batch, tokens]`, in pieces that are passed through the model one by one.

        Of a model that recomputes its activations, which spares memory at the price of time, every sample by itself.
        """
        recomputes = self.run.model.is_activation_checkpointing
        samples = 1 if recomputes else max(1, PASS_TOKENS // input_ids.shape[1])
        passes: tuple[Tensor, ...] = input_ids.split(samples)
        return passes


class GateFisher(GateCriterion):
    """`Σ_n g_n²` over samples n: the diagonal Fisher information of the gate.

    Unit: (nats per token)², summed over samples. Source: the masks' Fisher information of Kwon et al. 2022,
    arXiv 2204.09656.
    """

    def add_gradients(self, gradients_BU: Gates) -> None:
        """Add every sample's squared gradient."""
        for key, gradient_BU in gradients_BU.items():
            self.sums[key] += gradient_BU.double().square().sum(0)


class GateTaylor(GateCriterion):
    """`Σ_a |Σ_{n∈a} g_n|` over accumulations a of samples n: the first-order Taylor term.

    Unit: nats per token, summed over samples. The absolute value is taken per accumulation, so a longer one lets
    samples cancel, as they do in a training step. Source: Molchanov et al. 2019, arXiv 1906.10771; for LLMs,
    LLM-Pruner's "vectorized" Taylor, arXiv 2305.11627.
    """

    def __init__(self, run: ScoringRun, scoring: ScoringConfig) -> None:
        super().__init__(run, scoring)
        self.accumulated_U = {key: torch.zeros_like(total) for key, total in self.sums.items()}

    def add_gradients(self, gradients_BU: Gates) -> None:
        """Add the micro-batch to the accumulation."""
        for key, gradient_BU in gradients_BU.items():
            self.accumulated_U[key] += gradient_BU.double().sum(0)

    def end_accumulation(self) -> None:
        """Add the accumulation's absolute gradient and start a new one."""
        for key, accumulated_U in self.accumulated_U.items():
            self.sums[key] += accumulated_U.abs()
            accumulated_U.zero_()
