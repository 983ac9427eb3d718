"""Criteria that read the inputs of a block's output projection: forward passes only, one layer at a time.

If another criterion runs the same text through the same model, they can record these inputs there instead (`watch`).

Axes in tensor names: N tokens, C input columns of the output projection, U units, c columns of one unit, O rows.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

from gqaprune.common.console import track
from gqaprune.common.distributed import copy_from_first_rank, reduce_to_largest, sum_across_ranks
from gqaprune.common.precision import sum_in_double, to_double
from gqaprune.models.architecture import Block
from gqaprune.models.gates import freeze_parameters
from gqaprune.models.layerwise import Stream, embed_batches, run_layer, watch_inputs
from gqaprune.placement.layer_store import find_store
from gqaprune.plan import BlockKey
from gqaprune.scoring.criteria.base import Criterion, Scores, ScoringConfig, ScoringRun, cut_pieces
from gqaprune.surgery.gram import Gram, Memory, chunk_rows, count_panel_bytes, find_room

T = TypeVar("T")
Sums = dict[str, Tensor]
"""Sums over tokens by name, float64."""


class ActivationCriterion(Criterion, Generic[T]):
    """Sums statistics `T` of a block's units over all tokens, and scores the units from them."""

    goes_by_layer = True

    def __init__(self, run: ScoringRun, scoring: ScoringConfig) -> None:
        super().__init__(run, scoring)
        self._blocks: dict[int, list[Block]] = {}
        for block in run.blocks:
            self._blocks.setdefault(block.key.layer, []).append(block)
        self._watched: dict[BlockKey, T] = {}

    @abstractmethod
    def start(self, block: Block, memory: Memory) -> T:
        """Create statistics of no tokens; allocate matrices in `memory`."""

    @abstractmethod
    def add(self, statistics: T, x_NC: Tensor) -> None:
        """Add float32 inputs to the statistics."""

    @abstractmethod
    def add_ranks(self, statistics: T) -> bool:
        """Sum the statistics over all ranks; return whether they are finite."""

    @abstractmethod
    def rate(self, block: Block, statistics: T) -> Tensor:
        """Score a block's units from the statistics of all tokens, float64 `[units]`; may overwrite the statistics."""

    def count_bytes(self, block: Block) -> int:
        """Count the bytes of a block's statistics, if they are not negligible beside activations."""
        return 0

    @property
    def passes_tokens_once(self) -> bool:
        """Whether no other pass was watched, because layers are then left out."""
        return not self._watched

    @contextmanager
    def watch(self, criterion: Criterion) -> Iterator[None]:
        """Sum statistics during the pass of another criterion, if it has one, for as many last layers as fit in memory.

        `score` then runs only the other layers. The statistics of all watched layers are in memory at once.

        Args:
            criterion: criterion of the same blocks, on text that begins with this one's. Its `score` must run within
                the context.
        """
        if self._watched or not criterion.passes_tokens_once:
            yield
            return
        memory, calibration = Memory(self.run.device), self.run.calibration
        blocks = self._choose_blocks_to_watch(find_room(self.run.device, criterion.count_kept_bytes()))
        totals = {block.key: self.start(block, memory) for block in blocks}
        remaining = dict.fromkeys(totals, sum(calibration.batches[index].numel() for index in calibration.own_batches))

        @torch.no_grad()
        def add(key: BlockKey, x_NC: Tensor) -> None:
            x_NC = x_NC[: remaining[key]]
            remaining[key] -= len(x_NC)
            if len(x_NC):
                self.add(totals[key], x_NC.float())

        with watch_inputs({block.key: block.output for block in blocks}, add):
            yield
        self._watched = totals

    def _choose_blocks_to_watch(self, room: int) -> list[Block]:
        """Choose the blocks of the last layers whose statistics fit in `room` bytes, the same on every rank."""
        room = -reduce_to_largest(torch.tensor([-room], device=self.run.device))[0]
        chosen = []
        for _, blocks in sorted(self._blocks.items(), reverse=True):
            room -= sum(self.count_bytes(block) for block in blocks)
            if room < 0:
                break
            chosen += blocks
        return chosen

    @torch.no_grad()
    def score(self) -> Scores:
        """Run each rank's batches through the layers that were not watched, and score all units."""
        run, calibration = self.run, self.run.calibration
        scores: Scores = {}
        watched = sorted({key.layer for key in self._watched})
        passed = range(max(self._blocks.keys() - set(watched), default=-1) + 1)
        pieces = [piece_BT for index in calibration.own_batches for piece_BT in cut_pieces(calibration.batches[index])]
        with freeze_parameters(run.model):
            streams = embed_batches(run.model, pieces if passed else [])
            layers = track([*watched, *passed], run.name, "layers")  # watched layers first, to free their statistics
            for layer in find_store(run.model).hold_each(layers):
                blocks = self._blocks.get(layer, [])
                statistics = self._measure_layer(layer, blocks, streams) if layer in passed else self._watched
                for block in blocks:
                    total = statistics.pop(block.key)
                    if not self.add_ranks(total):
                        raise ValueError(
                            f"{block.key}: the input of its output projection is not finite on the calibration text: "
                            "activations overflow; load the model with dtype bfloat16 or float32"
                        )
                    scores[block.key] = self.rate(block, total)
        # All ranks rate the same sums. Rank 0's scores are used everywhere, so that every bit is the same.
        for score_U in scores.values():
            copy_from_first_rank(score_U)
        return {block.key: scores[block.key].cpu() for block in run.blocks}

    def _measure_layer(self, layer: int, blocks: list[Block], streams: list[Stream]) -> dict[BlockKey, T]:
        """Sum statistics of a layer's blocks while this rank's streams run through it."""
        memory = Memory(self.run.device)
        totals = {block.key: self.start(block, memory) for block in blocks}

        def add(key: BlockKey, x_NC: Tensor) -> None:
            self.add(totals[key], x_NC.float())

        with watch_inputs({block.key: block.output for block in blocks}, add):
            for stream in streams:
                stream.hidden_BTD = run_layer(self.run.model, layer, stream)
        return totals


class SumsCriterion(ActivationCriterion[Sums]):
    """A criterion whose statistics are a few numbers per column."""

    @abstractmethod
    def measure(self, x_NC: Tensor) -> Sums:
        """Compute sums over some inputs; for no tokens, zeros of the right shapes."""

    def start(self, block: Block, memory: Memory) -> Sums:
        """Return zeros."""
        return self.measure(torch.zeros(0, block.output.in_features, device=memory.device))

    def add(self, statistics: Sums, x_NC: Tensor) -> None:
        """Add each sum."""
        for name, value in self.measure(x_NC).items():
            statistics[name] += value

    def add_ranks(self, statistics: Sums) -> bool:
        """Sum all statistics in one reduction."""
        statistics.update(sum_across_ranks(statistics))
        return all(bool(value.isfinite().all()) for value in statistics.values())


class Wanda(SumsCriterion):
    """`Σ_{c∈u} ‖x_c‖₂ · Σ_o |W_oc|`: weights times the norms of their inputs, over the unit's output columns.

    Unit: of the block's output times √tokens. Source: Sun et al. 2023, arXiv 2306.11695; summed over units as in FLAP's
    structured variant (Wanda-sp).
    """

    def measure(self, x_NC: Tensor) -> Sums:
        """Sum the squares."""
        return {"squares_C": sum_in_double(x_NC.square(), 0)}

    def rate(self, block: Block, statistics: Sums) -> Tensor:
        """Multiply norms by column sums."""
        weights_C = sum_in_double(block.output.weight.float().abs(), 0)
        return _sum_units(block, statistics["squares_C"].sqrt() * weights_C)


class WeightedVariance(SumsCriterion):
    """`Σ_{c∈u} Var(x_c) · ‖W_:c‖²`: FLAP's fluctuation (WIFV), the part of the output that no bias can replace.

    The sample variance over all tokens. Unit: of the block's output, squared. Source: An et al. 2023, arXiv 2312.11983.
    """

    def measure(self, x_NC: Tensor) -> Sums:
        """Count tokens, and sum inputs and their squares."""
        return {
            "tokens": sum_in_double(x_NC.new_tensor(len(x_NC))),
            "sum_C": sum_in_double(x_NC, 0),
            "squares_C": to_double(x_NC).square().sum(0),
        }

    def rate(self, block: Block, statistics: Sums) -> Tensor:
        """Multiply variances by squared column norms."""
        tokens, sum_C = statistics["tokens"], statistics["sum_C"]
        variance_C = (statistics["squares_C"] - sum_C.square() / tokens).clamp_min(0) / (tokens - 1).clamp_min(1)
        weights_C = sum_in_double(block.output.weight.float().square(), 0)
        return _sum_units(block, variance_C * weights_C)


class BrainSurgeon(ActivationCriterion[Gram]):
    """`½ tr(W_u [(H⁻¹)_uu]⁻¹ W_uᵀ)`: half the squared error that remains when unit u is removed and the rest refitted.

    `H = Σ x xᵀ / tokens + λI` with `λ = obs_ridge · mean(diag)`; u denotes the unit's columns of the output projection
    W. Unit: of the block's output, squared, per token. Source: Hassibi and Stork 1992, "Second order
    derivatives for network pruning: optimal brain surgeon"; for structures of language models, ZipLM, arXiv 2302.04089.
    """

    uses = ("obs_ridge",)

    def count_bytes(self, block: Block) -> int:
        """Count the bytes of the Gram matrix."""
        return count_panel_bytes(block.output.in_features)

    def start(self, block: Block, memory: Memory) -> Gram:
        """Return an empty Gram matrix."""
        return Gram(block.output.in_features, memory)

    def add(self, statistics: Gram, x_NC: Tensor) -> None:
        """Add the inputs to the Gram matrix."""
        statistics.add(x_NC)

    def add_ranks(self, statistics: Gram) -> bool:
        """Sum the Gram matrix panel by panel."""
        statistics.sum_across_ranks()
        return statistics.is_finite()

    def rate(self, block: Block, statistics: Gram) -> Tensor:
        """Compute errors from the diagonal blocks of the inverse."""
        units, size = block.units, block.columns_per_unit
        diagonal_C = statistics.get_diagonal()
        if not diagonal_C.any():  # all inputs are 0, so removing any unit changes nothing
            return diagonal_C.new_zeros(units)
        # Factorise Σ x xᵀ + tokens · λI in place, which is tokens times H.
        penalty_C = torch.full_like(diagonal_C, self.scoring.obs_ridge * float(diagonal_C.mean()))
        if not statistics.factorise([statistics], penalty_C):
            raise ValueError(
                f"{block.key}: the least squares of obs have no solution with scoring.obs_ridge "
                f"{self.scoring.obs_ridge}; set it to 0.1 or calibrate on more text"
            )
        factor_Ucc = torch.linalg.cholesky(statistics.invert_diagonal(size))
        score_U = torch.zeros_like(factor_Ucc[:, 0, 0])
        for chosen in chunk_rows(units, 2 * size * block.output.out_features):  # the solver copies its input
            columns = slice(chosen.start * size, chosen.stop * size)
            weight_UcO = to_double(block.output.weight[:, columns]).T.reshape(-1, size, block.output.out_features)
            score_U[chosen] = (weight_UcO * torch.cholesky_solve(weight_UcO, factor_Ucc[chosen])).sum((1, 2))
        return 0.5 * score_U / statistics.tokens


def _sum_units(block: Block, score_C: Tensor) -> Tensor:
    score_U: Tensor = score_C.view(block.units, block.columns_per_unit).sum(1)
    return score_U
