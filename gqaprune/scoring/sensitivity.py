"""Sensitivity: the importance of each layer or block to the model. It is measured once and can be saved and reused.

Each measure in `SENSITIVITIES` returns one importance per block; higher means more important. Measures of whole layers
give both blocks of a layer the same. Axes in tensor names: B samples, T tokens, D hidden width.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from gqaprune.common.atomic_files import check_can_be_folder, write_atomically
from gqaprune.common.distributed import get_rank_and_world_size, is_true_anywhere
from gqaprune.common.json_files import read_json
from gqaprune.common.precision import multiply_exactly, to_double
from gqaprune.data.calibration import CalibrationSet
from gqaprune.geometry import Geometry
from gqaprune.models.architecture import Block, compute_addition, find_adder, read_geometry
from gqaprune.models.layerwise import record_layer_inputs, resume_at
from gqaprune.models.losses import average_losses, measure_losses
from gqaprune.placement.model_hash import hash_model, hash_tensors
from gqaprune.plan import BlockKey
from gqaprune.scoring.averages import average_over_batches

FORMAT = "gqaprune-sensitivity/1"

Importance = dict[BlockKey, float]
"""Importance of every block."""


@dataclass(frozen=True)
class Origin:
    """What a sensitivity was measured on. Sensitivities of equal origin are equal.

    Args:
        method: a name in `SENSITIVITIES`.
        model: name or folder of the model.
        geometry: shapes of the model.
        corpora: calibration corpora.
        windows: number of calibration windows.
        window: tokens per window.
        seed: seed by which windows were chosen.
        weights: hash of the model's weights.
        text: hash of the calibration tokens.
    """

    method: str
    model: str
    geometry: Geometry
    corpora: tuple[str, ...]
    windows: int
    window: int
    seed: int
    weights: str
    text: str

    def difference(self, other: "Origin") -> str | None:
        """Describe the first difference between two origins, ignoring the model's name; None if there is none."""
        if self.method == other.method and (difference := self.geometry.difference(other.geometry)):
            return difference
        for field in fields(self):
            if field.name == "model":
                continue  # the weights are compared instead
            value, other_value = getattr(self, field.name), getattr(other, field.name)
            if value != other_value:
                return f"{field.name} {value!r} against {other_value!r}"
        return None


@dataclass(frozen=True)
class Sensitivity:
    """The importance of blocks, and what it was measured on."""

    origin: Origin
    importance: Importance

    def check_fits(self, origin: Origin, blocks: Sequence[Block]) -> None:
        """Refuse a sensitivity of another model, method or calibration than this run's, or one that lacks a block.

        Raises:
            ValueError: naming the first difference.
        """
        if difference := self.origin.difference(origin):
            raise ValueError(
                f"the saved sensitivity is of another run: {difference} (saved against this run); use the settings "
                "that it was measured with, or set another sensitivity.path to measure again"
            )
        if missing := [str(block.key) for block in blocks if block.key not in self.importance]:
            raise ValueError(f"the saved sensitivity lacks {missing[0]}; set another sensitivity.path to measure again")

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        importance = [{"layer": key.layer, "kind": key.kind, "value": value} for key, value in self.importance.items()]
        data = {"format": FORMAT, **asdict(self.origin), "importance": importance}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "Sensitivity":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is missing or is not a sensitivity.
        """
        data = read_json(path, "sensitivity")
        try:
            return cls._from_dict(data)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a sensitivity of format {FORMAT!r} ({error})") from None

    @classmethod
    def _from_dict(cls, data: Any) -> "Sensitivity":
        if data["format"] != FORMAT:
            raise ValueError(f"found {data['format']!r}")
        origin = Origin(
            method=str(data["method"]),
            model=str(data["model"]),
            geometry=Geometry.from_dict(data["geometry"]),
            corpora=tuple(str(name) for name in data["corpora"]),
            windows=int(data["windows"]),
            window=int(data["window"]),
            seed=int(data["seed"]),
            weights=str(data.get("weights")),
            text=str(data.get("text")),
        )
        entries = data["importance"]
        if any(entry["kind"] not in ("attention", "mlp") for entry in entries):
            raise ValueError("kind must be attention or mlp")
        return cls(origin, {BlockKey(int(entry["layer"]), entry["kind"]): float(entry["value"]) for entry in entries})


@multiply_exactly()
def measure_sensitivity(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    calibration: CalibrationSet,
    method: str,
    path: str | Path | None = None,
) -> Sensitivity:
    """Load the sensitivity at `path` if it exists; otherwise measure it and save it there.

    In a process group rank 0 writes. If the file is missing on any rank, all ranks measure.

    Args:
        model: the dense causal LM.
        blocks: blocks to measure.
        calibration: the text, and where it comes from.
        method: a name in `SENSITIVITIES`.
        path: the JSON file; None measures without saving.

    Raises:
        ValueError: if the saved sensitivity is of another run, `path` cannot be written, or a value is not finite,
            naming the block and the batch.
    """
    batches = calibration.batches
    windows, window = sum(len(batch) for batch in batches), max(batch.shape[1] for batch in batches)
    hashes = hash_model(model), hash_tensors(batches)
    geometry, corpora, seed = read_geometry(model.config), calibration.corpora, calibration.seed
    origin = Origin(method, calibration.source, geometry, corpora, windows, window, seed, *hashes)
    device = next(model.parameters()).device
    if path is not None and not is_true_anywhere(not Path(path).exists(), device):
        sensitivity = Sensitivity.load(path)
        sensitivity.check_fits(origin, blocks)
        return sensitivity
    if path is not None:
        check_can_be_folder(Path(path).parent)
    sensitivity = Sensitivity(origin, SENSITIVITIES[method](model, blocks, batches))
    if path is not None and get_rank_and_world_size()[0] == 0:
        sensitivity.save(path)
    return sensitivity


def measure_removal(model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Tensor]) -> Importance:
    """Measure how much the mean loss rises, in nats per token, when a whole decoder layer is skipped.

    Layers before the skipped one are not computed again. Memory holds the inputs of all layers for one batch.
    """

    def measure(batch_BT: Tensor) -> Importance:
        inputs_BTD = record_layer_inputs(model, batch_BT)
        dense = _measure_dense_loss(model, inputs_BTD, batch_BT)
        layers = _list_layers(blocks)
        rises = {i: _measure_loss(model, i + 1, inputs_BTD[i], batch_BT) - dense for i in layers}
        return _spread_over_blocks(rises, blocks)

    return average_over_batches(model, batches, _list_keys(blocks), measure, "sensitivity: removal")


def measure_block_removal(model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Tensor]) -> Importance:
    """Measure how much the mean loss rises, in nats per token, when a block adds nothing to the residual stream."""

    def measure(batch_BT: Tensor) -> Importance:
        inputs_BTD = record_layer_inputs(model, batch_BT)
        dense = _measure_dense_loss(model, inputs_BTD, batch_BT)
        rises = {}
        for block in blocks:
            handle = block.output.register_forward_hook(_return_zeros)
            try:
                loss = _measure_loss(model, block.key.layer, inputs_BTD[block.key.layer], batch_BT)
            finally:
                handle.remove()
            rises[block.key] = loss - dense
        return rises

    return average_over_batches(model, batches, _list_keys(blocks), measure, "sensitivity: block removal")


def measure_activation(model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Tensor]) -> Importance:
    """Measure `‖block output‖ / ‖residual stream before it‖`, mean over tokens; an MLP includes experts beside it."""

    def measure(batch_BT: Tensor) -> Importance:
        with _record_outputs({block.key: find_adder(model, block) for block in blocks}) as outputs_BTD:
            inputs_BTD = record_layer_inputs(model, batch_BT)
        ratios = {}
        for key, output_BTD in outputs_BTD.items():
            output_BTD = compute_addition(model, key, output_BTD)
            # The residual stream before the MLP is the layer's output minus the MLP's.
            stream_BTD = inputs_BTD[key.layer] if key.kind == "attention" else inputs_BTD[key.layer + 1] - output_BTD
            ratios[key] = float((to_double(output_BTD).norm(dim=-1) / to_double(stream_BTD).norm(dim=-1)).mean())
        return ratios

    return average_over_batches(model, batches, _list_keys(blocks), measure, "sensitivity: activation")


def measure_block_influence(model: PreTrainedModel, blocks: Sequence[Block], batches: Sequence[Tensor]) -> Importance:
    """Measure `1 - cos(layer input, layer output)`, mean over tokens. Source: ShortGPT, arXiv 2403.03853, eq. 1."""

    def measure(batch_BT: Tensor) -> Importance:
        inputs_BTD = record_layer_inputs(model, batch_BT)
        influence = {}
        for i in _list_layers(blocks):
            before_BTD, after_BTD = to_double(inputs_BTD[i]), to_double(inputs_BTD[i + 1])
            cosine_BT = functional.cosine_similarity(before_BTD, after_BTD, dim=-1)
            influence[i] = float(1 - cosine_BT.mean())
        return _spread_over_blocks(influence, blocks)

    return average_over_batches(model, batches, _list_keys(blocks), measure, "sensitivity: block influence")


SENSITIVITIES: Mapping[str, Callable[[PreTrainedModel, Sequence[Block], Sequence[Tensor]], Importance]] = {
    "removal": measure_removal,
    "block_removal": measure_block_removal,
    "activation": measure_activation,
    "block_influence": measure_block_influence,
}
"""Name -> function of (model, blocks, batches) to the importance of each block; ValueError if one is not finite."""


@contextmanager
def _record_outputs(adders: Mapping[BlockKey, nn.Module]) -> Iterator[dict[BlockKey, Tensor]]:
    """Record each module's output in the last forward within the context, `[batch, tokens, width]`."""
    outputs_BTD: dict[BlockKey, Tensor] = {}

    def record(key: BlockKey, output_BTD: Tensor) -> None:
        outputs_BTD[key] = output_BTD

    with ExitStack() as hooks:
        for key, module in adders.items():
            handle = module.register_forward_hook(lambda _, __, output, key=key: record(key, output))
            hooks.callback(handle.remove)
        yield outputs_BTD


def _measure_loss(model: PreTrainedModel, layer: int, hidden_BTD: Tensor, batch_BT: Tensor) -> float:
    """Measure the mean loss in nats per token of a forward that starts at decoder layer `layer` with hidden states."""
    with resume_at(model, layer, hidden_BTD):
        losses_B, tokens_B = measure_losses(model, batch_BT, batch_BT)
    return float(average_losses(losses_B, tokens_B))


def _measure_dense_loss(model: PreTrainedModel, inputs_BTD: Sequence[Tensor], batch_BT: Tensor) -> float:
    loss = _measure_loss(model, len(inputs_BTD) - 1, inputs_BTD[-1], batch_BT)
    if not math.isfinite(loss):
        raise FloatingPointError("the loss of the dense model")
    return loss


def _return_zeros(_: nn.Module, __: tuple[Tensor, ...], output_BTD: Tensor) -> Tensor:
    return torch.zeros_like(output_BTD)


def _spread_over_blocks(of_layer: Mapping[int, float], blocks: Sequence[Block]) -> Importance:
    return {block.key: of_layer[block.key.layer] for block in blocks}


def _list_keys(blocks: Sequence[Block]) -> list[BlockKey]:
    return [block.key for block in blocks]


def _list_layers(blocks: Sequence[Block]) -> list[int]:
    return sorted({block.key.layer for block in blocks})
