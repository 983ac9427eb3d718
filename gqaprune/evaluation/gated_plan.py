"""Apply a plan as gates on the dense model, to measure the cost of a cut, or of a part of it, without cutting.

Cutting equals gating, so the gated dense model has the perplexity of the cut one before repair and training. Gates set
to 1 again restore units or layers: the difference is the cost of cutting them.

Axes in tensor names: B samples, T tokens, U units.
"""

import copy
import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.models.architecture import find_blocks, get_layers
from gqaprune.models.gates import Gates, apply_gates
from gqaprune.models.layerwise import embed_batches, record_layer_inputs, resume_at, run_layer
from gqaprune.models.losses import average_losses, measure_losses
from gqaprune.plan import BlockKey, PruningPlan
from gqaprune.scoring.averages import average_over_batches
from gqaprune.scoring.damage import make_gates
from gqaprune.scoring.scores import Scores
from gqaprune.surgery.cut import cut_block

MAPPING_TOLERANCE = 1e-3
"""Largest relative difference of a cut and a gated layer's output that rounding explains; 1e-2 in 16 bits."""


class GatedPlan:
    """The dense model, gated as a plan would cut it.

    Args:
        model: the dense causal LM, which is not changed.
        plan: plan with the units that are kept.
    """

    def __init__(self, model: PreTrainedModel, plan: PruningPlan) -> None:
        self.model, self.plan = model, plan
        granularity = "group" if all(kept.queries is None for kept in plan.layers) else "query"
        self.blocks = find_blocks(model, granularity)
        self.kept = {block.key: self._list_kept(block.key, granularity) for block in self.blocks}
        self.cut = [block for block in self.blocks if len(self.kept[block.key]) < block.units]
        self.gates: dict[BlockKey, Tensor] = {}
        for block in self.cut:
            gate_U = torch.zeros(1, block.units, device=model.device)
            gate_U[0, list(self.kept[block.key])] = 1
            self.gates[block.key] = gate_U

    def list_removed(self, key: BlockKey) -> set[int]:
        """List the units that the plan removes from a block."""
        units = next(block.units for block in self.blocks if block.key == key)
        return set(range(units)) - set(self.kept[key])

    def restore_units(self, units: Mapping[BlockKey, Collection[int]]) -> Gates:
        """Return the plan's gates with some units restored."""
        gates = dict(self.gates)
        for key in units.keys() & gates.keys():
            gates[key] = gates[key].clone()
            gates[key][0, list(units[key])] = 1
        return gates

    def restore_layers(self, layers: Collection[int]) -> Gates:
        """Return the plan's gates without those of some layers."""
        return {key: gate_BU for key, gate_BU in self.gates.items() if key.layer not in layers}

    def choose_by_scores(self, scores: Scores, share: float = 1.0) -> Gates:
        """Return gates that remove as many units as the plan, or a share of them, chosen by other scores."""
        removed = {}
        for block in self.cut:
            count, rest = divmod(block.units - len(self.kept[block.key]), block.groups)
            if rest == 0 and block.key in scores:
                removed[block.key] = math.floor(count * share)
        chosen = make_gates(self.cut, scores, removed, self.model.device)
        return {key: chosen.get(key, gate_BU) for key, gate_BU in self.gates.items()}

    def measure(self, gates: Gates, batches: Sequence[Mapping[str, Tensor]], description: str = "cut") -> float:
        """Measure perplexity with gates on batches of `input_ids` and `labels`; infinite if a loss is not finite."""
        with apply_gates(self.blocks, gates):
            return measure_perplexity_or_infinity(self.model, batches, description)

    def measure_restoring_each(self, batches: Sequence[Tensor]) -> dict[int, float]:
        """Measure perplexity with one layer restored and all others cut, for each layer that the plan cuts.

        Layers before the restored one are not run again.

        Args:
            batches: token ids, each `[batch, tokens]`, the same list on every rank.

        Raises:
            ValueError: if a loss is not finite, with its layer.
        """
        layers = sorted({key.layer for key in self.gates})

        def measure(batch_BT: Tensor) -> dict[int, float]:
            with apply_gates(self.blocks, self.gates):
                inputs_BTD = record_layer_inputs(self.model, batch_BT)
            mean_losses = {}
            for layer in layers:
                gates = self.restore_layers([layer])
                with resume_at(self.model, layer, inputs_BTD[layer]), apply_gates(self.blocks, gates):
                    losses_B, tokens_B = measure_losses(self.model, batch_BT, batch_BT)
                mean_losses[layer] = float(average_losses(losses_B, tokens_B))
            return mean_losses

        losses = average_over_batches(self.model, batches, layers, measure, "layers restored one at a time")
        return {layer: math.exp(loss) for layer, loss in losses.items()}

    @torch.no_grad()
    def find_wrong_cuts(self, batch_BT: Tensor) -> list[int]:
        """Find layers whose output differs between cutting and gating, for example by wrong KV heads.

        One layer at a time is copied, cut and compared, each on the dense model's hidden states.

        Args:
            batch_BT: token ids, `[batch, tokens]`.
        """
        model, layers = self.model, get_layers(self.model)
        tolerance = MAPPING_TOLERANCE if model.dtype == torch.float32 else 10 * MAPPING_TOLERANCE
        (stream,) = embed_batches(model, [batch_BT])
        wrong = []
        for layer in range(len(layers)):
            if any(key.layer == layer for key in self.gates):
                with apply_gates(self.blocks, self.gates):
                    gated_BTD = run_layer(model, layer, stream)
                dense, layers[layer] = layers[layer], copy.deepcopy(layers[layer])
                try:
                    pairs = zip(find_blocks(model), find_blocks(model, "query"), strict=True)
                    for block, heads in pairs:
                        if block.key.layer == layer:
                            cut_block(model, self.plan, block, heads)
                    cut_BTD = run_layer(model, layer, stream)
                finally:
                    layers[layer] = dense
                change_BTD = gated_BTD - stream.hidden_BTD  # only the layer's part: the residual stream hides errors
                if not (cut_BTD - gated_BTD).norm() <= tolerance * change_BTD.norm():
                    wrong.append(layer)
            stream.hidden_BTD = run_layer(model, layer, stream)
        return wrong

    def _list_kept(self, key: BlockKey, granularity: str) -> tuple[int, ...]:
        kept = self.plan.layers[key.layer]
        if key.kind == "mlp":
            return kept.channels
        return kept.groups if granularity == "group" else self.plan.list_queries(key.layer)


def measure_perplexity_or_infinity(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], description: str
) -> float:
    """Measure perplexity on batches of `input_ids` and `labels`; infinite if `measure_perplexity` raises an error."""
    try:
        return measure_perplexity(model, {"held-out text": batches}, description)["held-out text"]
    except ValueError:
        return math.inf
