"""Cut and repair a model layer by layer: refit output projections by ridge least squares, then refine MLPs.

The kept columns of `o_proj` and `down_proj` are refitted to the block's output before its cut, on inputs from the
already pruned layers before it. `refinement.py` then trains the MLPs further. Memory holds the second moments of one
block, the hidden states between two layers, and the inputs and targets of one MLP.

Sources: least squares over the kept units, Kwon et al. 2022 (arXiv 2204.09656) and ZipLM (arXiv 2302.04089), layer by
layer as in Týr-the-Pruner; bias compensation, FLAP (arXiv 2312.11983); targets of the dense model on inputs of the
changed one ("asymmetric calibration"), GPTAQ (arXiv 2504.02692).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.common.console import console, track
from gqaprune.common.distributed import get_rank_and_world_size
from gqaprune.common.precision import multiply_exactly
from gqaprune.common.stage_cache import StageCache, StageResult
from gqaprune.models.architecture import Block, add_biases, find_blocks, get_layers, get_module
from gqaprune.models.families import get_family
from gqaprune.models.gates import freeze_parameters
from gqaprune.placement.layer_store import find_store
from gqaprune.plan import BlockKey, BlockKind, PruningPlan
from gqaprune.surgery.block_refit import refit_block
from gqaprune.surgery.block_targets import measure_moments
from gqaprune.surgery.cut import apply_plan, check_plan, cut_block, list_kept_columns, write_shapes
from gqaprune.surgery.gram import Memory
from gqaprune.surgery.layer_damage import LayerDamageMeter
from gqaprune.surgery.products import settle_products
from gqaprune.surgery.refinement import Refinement, refine_mlp, reserve_pairs
from gqaprune.surgery.repair_config import RepairConfig
from gqaprune.surgery.streams import LayerStreams, Streams


@dataclass(frozen=True)
class BlockRepair:
    """Result of repairing one block.

    Errors are squared, on held-out batches, relative to the squared target.

    Args:
        key: the block.
        ridge: the chosen ridge, 0 if only a bias was fitted; None if no fit was better than the cut weights.
        error_before: error of the cut weights.
        error_after: error with the chosen ridge, fitted without the held-out batches.
        refinement: result of refinement; None if the block was not refined.
    """

    key: BlockKey
    ridge: float | None
    error_before: float
    error_after: float
    refinement: Refinement | None = None

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types for reports and stages."""
        return asdict(self) | {"key": str(self.key)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "BlockRepair":
        """Build from the output of `to_dict`."""
        refinement = data["refinement"] and Refinement(**data["refinement"])
        return cls(**dict(data) | {"key": BlockKey.parse(data["key"]), "refinement": refinement})


@multiply_exactly()
def apply_plan_with_repair(
    model: PreTrainedModel,
    plan: PruningPlan,
    batches: Sequence[Tensor],
    config: RepairConfig | None = None,
    stages: StageCache | None = None,
    damage: LayerDamageMeter | None = None,
) -> list[BlockRepair]:
    """Cut a dense model to `plan` in place, as `apply_plan` does, and repair every block that loses units.

    In families that normalise a block's output before they add it to the residual stream, `pull` is 0 and the relative
    errors of all tokens have equal weight. In families that scale the output per token, `pull` is 0 too. A plan that
    removes nothing changes no bit.

    Args:
        model: the model that the plan was made for.
        plan: the units to keep.
        batches: calibration token ids, each `[batch, tokens]`; in a process group the same list on every rank.
        config: settings of repair; by default those of `PruningConfig`.
        stages: stages of a run with this model and these batches, which keep each repaired block. Blocks that they
            have are not repaired again.
        damage: a meter that is run on every layer before and after its repair.

    Returns:
        The results, block by block.

    Raises:
        ValueError: if the plan was made for other shapes, there are no batches, or the family's checkpoints cannot
            hold a bias; the model is then unchanged. Or if a block's activations are not finite, naming the block; the
            model is then cut up to it.
    """
    config, stages = config or RepairConfig(), stages or StageCache()
    family = get_family(model.config)
    if family.output_norms or family.scaled:
        config = replace(config, pull=0.0)
    check_plan(model, plan)
    repaired = {block.key for block in _select_blocks(find_blocks(model), plan, config)}
    if not repaired:
        apply_plan(model, plan)
        return []
    if not batches:
        raise ValueError("repair needs at least one calibration batch, got none")
    config = settle_products(config, model.device, stages)
    if config.fits_biases:
        kinds: tuple[BlockKind, ...] = ("attention", "mlp")
        add_biases(model, [kind for kind in kinds if any(key.kind == kind for key in repaired)])
    layers: list[list[tuple[Block, Block]]] = [[] for _ in get_layers(model)]
    for pair in zip(find_blocks(model), find_blocks(model, "query"), strict=True):
        layers[pair[0].key.layer].append(pair)
    inputs = {"plan": plan.to_dict()["layers"], "repair": asdict(config)}
    finished = set(stages.find([f"repair of {key}" for key in sorted(repaired)], inputs, "repaired blocks"))
    unfinished = [key for key in repaired if f"repair of {key}" not in finished]
    rank, world_size = get_rank_and_world_size()
    held_out = choose_held_out(len(batches), config.holdout)
    if config.refits_weights and unfinished and not held_out and rank == 0:
        console.print(
            "repair: nothing can be held out of a single calibration batch, so ridges and the length of training are "
            "chosen on the fitted text; lower data.calibration.batch_size or use more windows"
        )
    streamed = share_batches(len(batches), held_out, rank, world_size) if unfinished else []
    repairs = []
    with freeze_parameters(model), torch.no_grad():
        streams = Streams(
            model,
            [batches[index] for index in streamed],
            [index in held_out for index in streamed],
            dense_from=min(repaired).layer if config.follows_dense_model else None,
            last_layer=max((key.layer for key in unfinished), default=-1),
        )
        changed = {key.layer for key in repaired}
        cut = {block.key.layer for pairs in layers for block, _ in pairs if _loses(plan, block)}
        passed = range(max(changed) + 1 if damage is None else len(layers))
        for layer in find_store(model).hold_each(track(passed, "repair: blocks", "layers"), changed):
            attention = layers[layer][0][0]
            with streams.enter_layer(attention, needs_dense_attention=attention.key in repaired) as layer_streams:
                if damage is not None:
                    damage.run_whole(layer)
                for block, heads in layers[layer]:
                    name = f"repair of {block.key}"
                    if name in finished:
                        cut_block(model, plan, block, heads)
                        stage = stages.read(name)
                        get_module(model, block.key).load_state_dict(dict(stage.tensors))
                        repairs.append(BlockRepair.from_dict(stage.facts))
                    elif block.key in repaired:
                        repairs_mlp = BlockKey(layer, "mlp") in unfinished
                        repair = _repair_block(model, plan, block, heads, layer_streams, config, repairs_mlp)
                        repairs.append(repair)
                        stages.write(
                            name, inputs, StageResult(repair.to_dict(), get_module(model, block.key).state_dict())
                        )
                if damage is not None and layer in cut:
                    damage.run_repaired(layer)
    write_shapes(model, plan)
    return repairs


def choose_held_out(batches: int, share: float) -> set[int]:
    """Choose the batches to hold out, evenly spread: at least one and not all, but none of a single batch.

    Args:
        batches: number of calibration batches.
        share: share of them to hold out.

    Returns:
        Indexes of the held-out batches.
    """
    count = min(max(1, round(batches * share)), batches - 1)
    return {(number + 1) * batches // count - 1 for number in range(count)}


def share_batches(batches: int, held_out: set[int], rank: int, world_size: int) -> list[int]:
    """Indexes of a rank's batches: its share of those to fit on, and of the held-out ones, ascending.

    Every `world_size`-th batch would not do: evenly spread batches that are held out may all be one rank's.
    """
    fitted = [index for index in range(batches) if index not in held_out]
    return sorted(fitted[rank::world_size] + sorted(held_out)[world_size - 1 - rank :: world_size])


def _select_blocks(blocks: Sequence[Block], plan: PruningPlan, config: RepairConfig) -> list[Block]:
    if config.method == "none":
        return []
    cut = [block for block in blocks if _loses(plan, block)]
    return [block for block in blocks if block.key >= cut[0].key] if cut and config.refits_everywhere else cut


def _loses(plan: PruningPlan, block: Block) -> bool:
    return len(list_kept_columns(plan, block)) < block.output.in_features


def _repair_block(
    model: PreTrainedModel,
    plan: PruningPlan,
    block: Block,
    heads: Block,
    streams: LayerStreams,
    config: RepairConfig,
    repairs_mlp: bool,
) -> BlockRepair:
    """Measure a dense block, cut it and repair it.

    Args:
        model: the model, cut up to the block.
        plan: the units to keep.
        block: the block.
        heads: the same block with query heads as units.
        streams: streams at the block's layer.
        config: settings of repair.
        repairs_mlp: whether the layer's MLP is repaired as well, or is this block.
    """
    family, mlp = get_family(model.config), get_module(model, block.key)
    columns, memory = list_kept_columns(plan, block), Memory(block.output.weight.device)
    refines = config.refines and block.key.kind == "mlp"
    is_whole_attention = block.key.kind == "attention" and len(columns) == block.output.in_features
    tokens = None
    if refines:
        tokens = reserve_pairs(streams.count_tokens(), block.inputs[0].linear.in_features, mlp)
    activations = streams.run_to(
        block,
        is_mlp_next=repairs_mlp and is_whole_attention,
        mlp_tokens=None if block.key.kind in family.scaled else tokens,
    )
    moments = measure_moments(
        model,
        block,
        columns,
        activations,
        memory,
        fits_weight=config.refits_weights,
        fits_bias=config.fits_biases,
        pull=config.pull,
        tokens=tokens,
    )
    cut_block(model, plan, block, heads)
    ridge, error_before, error_after = refit_block(
        block,
        moments,
        memory,
        ridges=config.ridges if config.refits_weights else (0.0,),
        fits_weight=config.refits_weights,
        fits_bias=config.fits_biases,
        spares_held_out=refines,
    )
    repair = BlockRepair(block.key, ridge, error_before, error_after)
    if tokens is not None:
        is_normed = block.key.kind in family.output_norms
        refinement = refine_mlp(mlp, *tokens, config, block.key.layer, is_normed)
        repair = replace(repair, refinement=refinement)
    return repair
