"""Criteria from the inputs of a block's output projection: forward passes only, one layer at a time.

Axes in tensor names: N tokens, C input columns of the output projection, U units, c columns of one unit, O rows.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from gqaprune.architecture import Block, BlockKey
from gqaprune.criteria.base import Criterion, Scores
from gqaprune.distributed import get_rank_and_world_size, sum_across_ranks
from gqaprune.gates import freeze_parameters
from gqaprune.holding import hold_each
from gqaprune.layerwise import Stream, embed_batches, run_layer, watch_inputs
from gqaprune.progress import track

Statistics = dict[str, Tensor]
"""Sums over tokens by name, float64."""


class ActivationCriterion(Criterion):
    """Adds up statistics of a block's units over the tokens, and scores the units from them."""

    goes_by_layer = True

    @abstractmethod
    def measure(self, x_NC: Tensor) -> Statistics:
        """Statistics of float32 inputs; those of no tokens are zeros of the right shapes."""

    @abstractmethod
    def rate(self, block: Block, statistics: Statistics) -> Tensor:
        """Scores of a block's units from the statistics of all tokens, float64 `[units]`."""

    @torch.no_grad()
    def score(self) -> Scores:
        """Walk the dense model, each rank with its own batches."""
        calibration = self.calibration
        blocks: dict[int, list[Block]] = {}
        for block in calibration.blocks:
            blocks.setdefault(block.key.layer, []).append(block)
        scores: Scores = {}
        with freeze_parameters(calibration.model):
            streams = embed_batches(calibration.model, [calibration.batches[i] for i in calibration.own_batches])
            for layer in hold_each(
                calibration.model, track(range(max(blocks, default=-1) + 1), calibration.name, "layers")
            ):
                statistics = self._measure_layer(layer, blocks.get(layer, []), streams)
                for block in blocks.get(layer, []):
                    total = sum_across_ranks(statistics.pop(block.key))
                    _check_finite(block.key, total)
                    scores[block.key] = self.rate(block, total)
        # All ranks rate the same sums; the first one's scores count, so that not a bit differs.
        rank, _ = get_rank_and_world_size()
        scores = sum_across_ranks({key: score * (rank == 0) for key, score in scores.items()})
        return {block.key: scores[block.key].cpu() for block in calibration.blocks}

    def _measure_layer(self, layer: int, blocks: list[Block], streams: list[Stream]) -> dict[BlockKey, Statistics]:
        """Statistics of a layer's blocks on this rank's streams, which move on to the next layer."""
        totals = {
            block.key: self.measure(torch.zeros(0, block.output.in_features, device=block.output.weight.device))
            for block in blocks
        }

        def add(key: BlockKey, x_NC: Tensor) -> None:
            for name, value in self.measure(x_NC.float()).items():
                totals[key][name] += value

        with watch_inputs({block.key: block.output for block in blocks}, add):
            for stream in streams:
                stream.hidden_BTD = run_layer(self.calibration.model, layer, stream)
        return totals


class Wanda(ActivationCriterion):
    """`Σ_{c∈u} ‖x_c‖₂ · Σ_o |W_oc|`: weights times the norms of their inputs, over the unit's output columns.

    Unit: of the block's output times √tokens. Source: Sun et al. 2023, arXiv 2306.11695; summed over units as in FLAP's
    structured variant (Wanda-sp).
    """

    def measure(self, x_NC: Tensor) -> Statistics:
        """Sum of squares."""
        return {"squares_C": x_NC.square().sum(0, dtype=torch.float64)}

    def rate(self, block: Block, statistics: Statistics) -> Tensor:
        """Norms times column sums."""
        weights_C = block.output.weight.float().abs().sum(0, dtype=torch.float64)
        return _sum_units(block, statistics["squares_C"].sqrt() * weights_C)


class WeightedVariance(ActivationCriterion):
    """`Σ_{c∈u} Var(x_c) · ‖W_:c‖²`: FLAP's fluctuation (WIFV), what a constant cannot stand in for.

    The sample variance over all tokens. Unit: of the block's output, squared. Source: An et al. 2023, arXiv 2312.11983.
    """

    def measure(self, x_NC: Tensor) -> Statistics:
        """Number, sum and sum of squares."""
        return {
            "tokens": x_NC.new_tensor(len(x_NC), dtype=torch.float64),
            "sum_C": x_NC.sum(0, dtype=torch.float64),
            "squares_C": x_NC.double().square().sum(0),
        }

    def rate(self, block: Block, statistics: Statistics) -> Tensor:
        """Variances times squared column norms."""
        tokens, sum_C = statistics["tokens"], statistics["sum_C"]
        variance_C = (statistics["squares_C"] - sum_C.square() / tokens).clamp_min(0) / (tokens - 1).clamp_min(1)
        weights_C = block.output.weight.float().square().sum(0, dtype=torch.float64)
        return _sum_units(block, variance_C * weights_C)


class BrainSurgeon(ActivationCriterion):
    """`½ tr(W_u [(H⁻¹)_uu]⁻¹ W_uᵀ)`: half the squared error that is left when unit u goes and the others are refitted.

    `H = Σ x xᵀ / tokens + λI` with `λ = obs_ridge · mean(diag)`; u stands for the unit's columns of the output
    projection W. Unit: of the block's output, squared, per token. Source: Hassibi and Stork 1992, "Second order
    derivatives for network pruning: optimal brain surgeon"; for structures of language models, ZipLM, arXiv 2302.04089.
    """

    uses = ("obs_ridge",)

    def measure(self, x_NC: Tensor) -> Statistics:
        """Number and Gram matrix; products in float32, sums of batches in float64."""
        return {"tokens": x_NC.new_tensor(len(x_NC), dtype=torch.float64), "gram_CC": (x_NC.T @ x_NC).double()}

    def rate(self, block: Block, statistics: Statistics) -> Tensor:
        """Errors from the diagonal blocks of the inverse."""
        units, size = block.units, block.columns_per_unit
        hessian_CC = statistics["gram_CC"].div_(statistics["tokens"])
        diagonal_C = hessian_CC.diagonal()
        if not diagonal_C.any():  # no input ever: nothing is lost with any unit
            return diagonal_C.new_zeros(units)
        diagonal_C += self.options.obs_ridge * diagonal_C.mean()
        factor_CC, failed = torch.linalg.cholesky_ex(hessian_CC)
        if failed:
            raise ValueError(
                f"{block.key}: the least squares of obs have no solution with obs_ridge {self.options.obs_ridge}; "
                "set obs_ridge to 0.1 or calibrate on more text"
            )
        inverse_CC = torch.cholesky_inverse(factor_CC)
        inverse_Ucc = inverse_CC.view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        weight_UcO = block.output.weight.double().T.reshape(units, size, -1)
        error_UcO: Tensor = weight_UcO * torch.cholesky_solve(weight_UcO, torch.linalg.cholesky(inverse_Ucc))
        return 0.5 * error_UcO.sum((1, 2))


def _sum_units(block: Block, score_C: Tensor) -> Tensor:
    score_U: Tensor = score_C.view(block.units, block.columns_per_unit).sum(1)
    return score_U


def _check_finite(key: BlockKey, statistics: Statistics) -> None:
    if not all(torch.isfinite(value).all() for value in statistics.values()):
        raise ValueError(
            f"{key}: the input of its output projection is not finite on the calibration text: activations overflow; "
            "load the model with dtype bfloat16 or float32"
        )
