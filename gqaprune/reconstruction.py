"""Repair while cutting: ridge least squares of every output projection, then refinement of every MLP, layer by layer.

The kept columns of `o_proj` and `down_proj` are refitted to what the block gave before its cut, on the inputs that the
already pruned layers before it give; `refinement.py` goes on from there. Second moments of one block are held at a
time, and no activations but the hidden states between two layers and one MLP's inputs and targets.

Sources: least squares over the kept units, Kwon et al. 2022 (arXiv 2204.09656) and ZipLM (arXiv 2302.04089), layer by
layer as in Týr-the-Pruner; bias compensation, FLAP (arXiv 2312.11983); targets of the dense model on inputs of the
changed one ("asymmetric calibration"), GPTAQ (arXiv 2504.02692).

Axes in tensor names: B samples, T tokens, N tokens of all samples, D hidden width, S kept columns of the output
projection and, last, a column of ones for its bias.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from gqaprune.architecture import (
    Block,
    BlockKey,
    add_biases,
    compute_addition,
    find_blocks,
    get_layers,
    get_module,
    read_residual_multiplier,
)
from gqaprune.distributed import get_rank_and_world_size, sum_across_ranks
from gqaprune.families import BlockKind, get_family
from gqaprune.gates import freeze_parameters
from gqaprune.holding import hold_each
from gqaprune.layerwise import Stream, embed_batches, run_layer
from gqaprune.least_squares import Moments
from gqaprune.plan import PruningPlan
from gqaprune.progress import track
from gqaprune.refinement import Refinement, RefinementOptions, TokenPairs, refine_mlp
from gqaprune.stages import Stage, Stages
from gqaprune.surgery import apply_plan, check_plan, cut_block, list_kept_columns, write_shapes


@dataclass(frozen=True)
class RepairOptions:
    """How blocks are repaired.

    Args:
        ridges: ridge strengths to choose from, in units of the mean squared input of the kept columns.
        holdout: share of the calibration batches that the choice is made on, between 0 and 1.
        pull: what a block is fitted to, 0 to 1: at 0, to its own output before the cut; at 1, to what brings the hidden
            states back to those of the dense model, which also makes up for the error of the layers before.
        everywhere: also refit blocks that lose nothing but come after one that does; needs `pull` above 0, without
            which they have nothing to make up for.
        refit: fit the weights.
        bias: fit a bias, where the family's checkpoints have a place for one; without `refit` it is the mean of what
            the removed columns gave.
        refinement: how MLPs are trained towards the same targets after that; not at all by default.

    Raises:
        ValueError: if a setting is out of its bounds.
    """

    ridges: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    holdout: float = 0.1
    pull: float = 0.0
    everywhere: bool = False
    refit: bool = True
    bias: bool = False
    refinement: RefinementOptions = field(default_factory=RefinementOptions)

    def __post_init__(self) -> None:
        if not self.ridges or not all(0 < ridge < float("inf") for ridge in self.ridges):
            raise ValueError(f"ridges must be one or more numbers above 0, got {self.ridges}; [0.1, 0.3, 1] do")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must be between 0 and 1, a share of the batches, got {self.holdout}; 0.1 does")
        if not 0 <= self.pull <= 1:
            raise ValueError(f"pull must be in [0, 1], got {self.pull}; 0 fits each block to its own output")
        if self.everywhere and self.pull == 0:
            raise ValueError("everywhere needs pull above 0: blocks that lose nothing give what they gave; got pull 0")
        if not (self.refit or self.bias):
            raise ValueError("repair with neither refit nor bias has nothing to fit; set one of them, or do not repair")


@dataclass(frozen=True)
class BlockRepair:
    """What repair did to one block.

    Errors are squared, on held-out windows, relative to the target's square.

    Args:
        key: the block.
        ridge: strength chosen (0 where only a bias was fitted); None where the block is better as it was cut.
        error_before: error of the block as it was cut.
        error_after: error with the fit of that strength that had not seen those windows.
        refinement: what came after; None where nothing did.
    """

    key: BlockKey
    ridge: float | None
    error_before: float
    error_after: float
    refinement: Refinement | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as reports and stages hold them."""
        return asdict(self) | {"key": str(self.key)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "BlockRepair":
        """What `to_dict` gave."""
        refinement = data["refinement"] and Refinement(**data["refinement"])
        return cls(**dict(data) | {"key": BlockKey.parse(data["key"]), "refinement": refinement})


def apply_plan_with_repair(
    model: PreTrainedModel,
    plan: PruningPlan,
    batches: Sequence[Tensor],
    options: RepairOptions | None = None,
    stages: Stages | None = None,
) -> list[BlockRepair]:
    """Cut a dense model to a plan, in place, as `apply_plan` does, and repair every block that loses units.

    Where what a block gives passes a norm before it is added to the residual stream, there is no pull, and every
    token's relative error counts alike; where every token scales it by itself, there is no pull either. A plan that
    removes nothing changes no bit.

    Args:
        model: the model that the plan was made for.
        plan: which units stay.
        batches: calibration token ids, each `[batch, tokens]`; in a process group the same list on every rank.
        options: how; ridge least squares of the weights by default.
        stages: of a run with this model and these batches, where each repaired block is kept; blocks that are there are
            not repaired again.

    Returns:
        What was done, block by block.

    Raises:
        ValueError: if the plan was made for other shapes, if there are no batches or the family has no place for a
            bias, the model being untouched then; or if a block's activations are not finite, with its place, the model
            being cut up to there.
    """
    options, stages = options or RepairOptions(), stages or Stages()
    family = get_family(model.config)
    if family.output_norms or family.scaled:
        options = replace(options, pull=0.0, everywhere=False)
    check_plan(model, plan)
    repaired = {block.key for block in _select_blocks(find_blocks(model), plan, options)}
    if not repaired:
        apply_plan(model, plan)
        return []
    if not batches:
        raise ValueError("repair needs at least one calibration batch, got none")
    if options.bias:
        kinds: tuple[BlockKind, ...] = ("attention", "mlp")
        add_biases(model, [kind for kind in kinds if any(key.kind == kind for key in repaired)])
    layers: list[list[tuple[Block, Block]]] = [[] for _ in get_layers(model)]
    for pair in zip(find_blocks(model), find_blocks(model, "query"), strict=True):
        layers[pair[0].key.layer].append(pair)
    inputs = {"plan": plan.to_dict()["layers"], "repair": asdict(options)}
    are_there = set(stages.find([f"repair of {key}" for key in sorted(repaired)], inputs, "repaired blocks"))
    left = [key for key in repaired if f"repair of {key}" not in are_there]
    first, last = min(repaired).layer, max((key.layer for key in left), default=-1)
    is_normed = bool(family.output_norms)
    rank, world_size = get_rank_and_world_size()
    own, held_out = range(rank, len(batches), world_size), choose_held_out(len(batches), options.holdout)
    are_held = [index in held_out for index in own]
    repairs = []
    with freeze_parameters(model), torch.no_grad():
        pruned = embed_batches(model, [batches[index] for index in own]) if left else []
        dense: list[Stream] = []
        changed = {key.layer for key in repaired}
        for layer in hold_each(model, track(range(max(changed) + 1), "reconstruction", "layers"), changed):
            if layer > last:  # all that is left is there: nothing is run for it
                dense, pruned = [], []
            if layer == first and options.pull > 0:
                dense = [replace(stream) for stream in pruned]  # until here the two are one
            goals = _advance_dense(model, layers[layer][0][0], dense)
            for block, heads in layers[layer]:
                name = f"repair of {block.key}"
                if name in are_there:
                    cut_block(model, plan, block, heads)
                    stage = stages.read(name)
                    get_module(model, block.key).load_state_dict(dict(stage.tensors))
                    repairs.append(BlockRepair.from_dict(stage.facts))
                elif block.key in repaired:
                    columns = list_kept_columns(plan, block)
                    goals_BTD = goals[block.key.kind]
                    refines = options.refinement.epochs > 0 and block.key.kind == "mlp"
                    seen = _measure_block(model, block, columns, pruned, are_held, goals_BTD, options.pull, refines)
                    cut_block(model, plan, block, heads)
                    repair = _refit_block(block, *seen.moments, options)
                    if refines:
                        mlp = get_module(model, block.key)
                        refinement = refine_mlp(mlp, *seen.tokens, options.refinement, layer, is_normed)
                        repair = replace(repair, refinement=refinement)
                    repairs.append(repair)
                    stages.write(name, inputs, Stage(repair.to_dict(), get_module(model, block.key).state_dict()))
            for stream in pruned:
                stream.hidden_BTD = run_layer(model, layer, stream)
    write_shapes(model, plan)
    return repairs


def choose_held_out(batches: int, share: float) -> set[int]:
    """Indexes of the batches that ridges are chosen on, evenly spread: at least one, and one left, of two or more."""
    count = min(max(1, round(batches * share)), batches - 1)
    return {(held + 1) * batches // count - 1 for held in range(count)}


def _select_blocks(blocks: Sequence[Block], plan: PruningPlan, options: RepairOptions) -> list[Block]:
    cut = [block for block in blocks if len(list_kept_columns(plan, block)) < block.output.in_features]
    return [block for block in blocks if block.key >= cut[0].key] if cut and options.everywhere else cut


def _advance_dense(
    model: PreTrainedModel, attention: Block, streams: Sequence[Stream]
) -> dict[BlockKind, list[Tensor]]:
    """Move streams through a dense layer; their hidden states after its attention and after its MLP."""
    goals: dict[BlockKind, list[Tensor]] = {"attention": [], "mlp": []}
    outputs_BTD: list[Tensor] = []
    handle = attention.output.register_forward_hook(lambda _, __, output: outputs_BTD.append(output))
    try:
        for stream in streams:
            before_BTD, stream.hidden_BTD = stream.hidden_BTD, run_layer(model, attention.key.layer, stream)
            goals["attention"].append(before_BTD + compute_addition(model, attention.key, outputs_BTD.pop()))
            goals["mlp"].append(stream.hidden_BTD)
    finally:
        handle.remove()
    return goals


class _BlockReachedError(Exception):
    """Ends a layer's forward once its attention is done; never leaves this file."""


def _run_to_block(model: PreTrainedModel, block: Block, stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a block's first and output projections, hidden states after the block; what follows it is not run."""
    calls: list[tuple[Tensor, Tensor]] = []
    inputs_BTD: list[Tensor] = []

    def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((inputs[0], output))
        if block.key.kind == "attention":
            raise _BlockReachedError

    first = block.inputs[0].linear.register_forward_pre_hook(lambda _, inputs: inputs_BTD.append(inputs[0]))
    handle = block.output.register_forward_hook(record)
    try:
        hidden_BTD = run_layer(model, block.key.layer, stream)
    except _BlockReachedError:
        hidden_BTD = stream.hidden_BTD + compute_addition(model, block.key, calls[0][1])
    finally:
        handle.remove()
        first.remove()
    (input_BTD,), ((x_BTC, _),) = inputs_BTD, calls
    if x_BTC.ndim == 2:  # MLPs beside experts see no samples
        input_BTD, x_BTC = (tensor.unflatten(0, hidden_BTD.shape[:2]) for tensor in (input_BTD, x_BTC))
    return input_BTD, x_BTC, hidden_BTD


@dataclass(frozen=True)
class _Seen:
    """What a block that is still whole was seen to take and asked to give: on windows to fit on, and on held-out ones.

    Args:
        moments: of its output projection, all ranks' together.
        tokens: of the whole block, this rank's; empty unless it is refined.
    """

    moments: tuple[Moments, Moments]
    tokens: tuple[TokenPairs, TokenPairs]


def _measure_block(
    model: PreTrainedModel,
    block: Block,
    columns: Tensor,
    streams: Sequence[Stream],
    are_held: Sequence[bool],
    goals_BTD: Sequence[Tensor],
    pull: float,
    keep_tokens: bool,
) -> _Seen:
    """Run this rank's streams through a block that is still whole.

    Args:
        model: the model, cut up to the block.
        block: the block.
        columns: columns of its output projection that will stay.
        streams: this rank's streams, which stay.
        are_held: whether each is held out.
        goals_BTD: the dense model's hidden states after the block, one for each stream; none are needed without pull.
        pull: how far the target goes from the block's own output to them.
        keep_tokens: whether to keep inputs and targets, too.
    """
    weight_DC, bias_D = block.output.weight.float(), block.output.bias
    is_normed = block.key.kind in get_family(model.config).output_norms
    parts = [Moments.of_no_tokens(len(columns) + 1, weight_DC) for _ in range(2)]
    none = block.output.weight.new_zeros(0, block.inputs[0].linear.in_features), weight_DC.new_zeros(0, len(weight_DC))
    tokens = [[none], [none]]
    for index, (stream, is_held) in enumerate(zip(streams, are_held, strict=True)):
        input_BTD, x_BTC, after_BTD = _run_to_block(model, block, stream)
        # Computed again, for in a narrow type the model's own output is rounded.
        target_BTD = functional.linear(x_BTC.float(), weight_DC, None if bias_D is None else bias_D.float())
        if goals_BTD:
            missing_BTD = goals_BTD[index].float() - after_BTD.float()
            target_BTD += pull / read_residual_multiplier(model.config) * missing_BTD
        x_BTS = functional.pad(x_BTC[..., columns].float(), (0, 1), value=1.0)
        weight_BT1 = torch.ones_like(x_BTS[..., :1])
        if is_normed:  # which makes all tokens' outputs alike in size: their relative errors count
            weight_BT1 /= target_BTD.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        parts[is_held].add((weight_BT1 * x_BTS).flatten(0, 1), (weight_BT1 * target_BTD).flatten(0, 1))
        if keep_tokens:
            tokens[is_held].append((input_BTD.flatten(0, 1), target_BTD.flatten(0, 1)))
    sums = sum_across_ranks({(part, name): value for part in (0, 1) for name, value in vars(parts[part]).items()})
    if not all(torch.isfinite(value).all() for value in sums.values()):
        raise ValueError(
            f"{block.key}: the input or the target of its output projection is not finite on the calibration text: "
            "activations overflow; load the model with dtype bfloat16 or float32"
        )
    fit, held = (Moments(*(sums[part, name] for name in vars(parts[part]))) for part in (0, 1))
    pairs = [TokenPairs(*map(torch.cat, zip(*part, strict=True))) for part in tokens]
    return _Seen((fit, held), (pairs[0], pairs[1]))


def _refit_block(block: Block, fit: Moments, held: Moments, options: RepairOptions) -> BlockRepair:
    """Write the best weights into a block that has been cut, those of rank 0 on every rank."""
    linear = block.output
    bias_D = torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias
    cut_SD = torch.cat([linear.weight, bias_D[:, None]], dim=1).double().T
    if held.gram_SS[-1, -1] == 0:  # the last is the number of tokens: of one batch, none was held out
        held = fit
    best_SD, repair = _choose_weights(block.key, cut_SD, linear.weight.dtype, fit, held, options)
    rank, _ = get_rank_and_world_size()
    best_SD = sum_across_ranks({"weights": best_SD * (rank == 0)})["weights"]
    linear.weight.copy_(best_SD[:-1].T)
    if linear.bias is not None:
        linear.bias.copy_(best_SD[-1])
    return repair


def _choose_weights(
    key: BlockKey, cut_SD: Tensor, dtype: torch.dtype, fit: Moments, held: Moments, options: RepairOptions
) -> tuple[Tensor, BlockRepair]:
    """The weights of the best ridge, fitted on all windows; those of the cut where no ridge beats them."""
    free = slice(None if options.refit else -1, None if options.bias else -1)
    before = held.measure_error(cut_SD)
    best_SD, repair = cut_SD, BlockRepair(key, None, before, before)
    for ridge in options.ridges if options.refit else (0.0,):
        weight_SD = fit.solve(cut_SD, ridge, free).to(dtype).double()  # judged as it will be stored
        error = held.measure_error(weight_SD)
        if error < repair.error_after:
            best_SD, repair = weight_SD, BlockRepair(key, ridge, before, error)
    if repair.ridge is not None:
        weight_SD = (fit + held).solve(cut_SD, repair.ridge, free).to(dtype).double()
        if held.measure_error(weight_SD) < before:
            best_SD = weight_SD
    return best_SD, repair
