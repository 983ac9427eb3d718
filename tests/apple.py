"""A device like Apple's GPUs, simulated on the CPU: it has no float64, and works on no tensor of the host's.

    python tests/apple.py    # measures, prunes and repairs tiny models there and on the CPU; prints both as JSON

A process that has imported this has one more accelerator, so tests run it in another one.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel

from gqaprune import PruningConfig, prune
from gqaprune.commands.device_speed import measure_device
from gqaprune.common import precision
from gqaprune.common.console import console
from gqaprune.data.calibration import CalibrationSet
from gqaprune.evaluation.generation import measure_text_perplexity
from gqaprune.evaluation.perplexity import CorpusPerplexities, measure_perplexity
from gqaprune.models import architecture
from gqaprune.models.architecture import find_blocks
from gqaprune.scoring.damage import measure_damage
from gqaprune.scoring.outliers import prepare_search
from gqaprune.scoring.scores import CRITERIA, score_units
from gqaprune.scoring.sensitivity import SENSITIVITIES, measure_sensitivity
from gqaprune.surgery.compatibility import check_compatibility

from tiny import make_model, make_tokens, make_unknown

_NAME = "apple"
_MOVES = (torch.ops.aten._to_copy, torch.ops.aten.copy_)
_INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put_)
"""Operations whose indexes may be the host's."""
_DOUBLES = (torch.float64, torch.complex128)


class AppleTensor(Tensor):
    """A tensor on the device; one of the host holds its numbers.

    Attributes:
        held: that holds them.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "AppleTensor":
        """Put numbers on the device."""
        _refuse_double(held.dtype, "a tensor")
        place = {"dtype": held.dtype, "device": torch.device(_NAME, 0)}
        own = torch.Tensor._make_wrapper_subclass(cls, held.shape, held.stride(), held.storage_offset(), **place)
        own.held = held
        return own

    @property
    def data(self) -> Any:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: "AppleTensor") -> None:
        self.held = value.held
        torch.Tensor.data.__set__(self, value)

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, arguments: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(operation, arguments, dict(keywords or {}))


class AppleMode(TorchDispatchMode):
    """Lets factories make tensors on the device, too."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(operation, arguments, dict(keywords or {}))


def _refuse_double(dtype: torch.dtype | None, what: str) -> None:
    if dtype in _DOUBLES:
        raise TypeError(f"{what} in float64: this device has none")


def _run(operation: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
    """Run an operation on the host's tensors that hold the device's; refuse what the device cannot do."""
    if torch.is_inference_mode_enabled():  # where what is made of other operations comes here, too
        with AppleMode():
            result = operation.decompose(*arguments, **keywords)
        if result is not NotImplemented:
            return result
    packet = operation._overloadpacket
    tensors = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
    is_there, place = any(isinstance(each, AppleTensor) for each in tensors), keywords.get("device")
    stays_there = is_there if place is None else torch.device(place).type == _NAME
    if is_there or stays_there:  # neither here nor on the way
        _refuse_double(keywords.get("dtype"), str(packet))
    if is_there and packet not in (*_MOVES, *_INDEXED):
        strangers = [each for each in tensors if not isinstance(each, AppleTensor) and each.ndim]
        if strangers:
            raise RuntimeError(f"{packet}: all tensors have to be on one device, got some of the host")
    if packet is torch.ops.aten.copy_ and is_there:
        _refuse_double(next((each.dtype for each in tensors if each.dtype in _DOUBLES), None), str(packet))
    inner = keywords if place is None else {**keywords, "device": torch.device("cpu")}
    result = operation(*tree_map(_hold, arguments), **tree_map(_hold, inner))
    if packet is torch.ops.aten.copy_:
        return arguments[0]
    if not stays_there:
        return result
    return return_and_correct_aliasing(operation, arguments, keywords, tree_map(_wrap, result))


def _hold(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, AppleTensor) else leaf


def _wrap(leaf: Any) -> Any:
    return AppleTensor(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, AppleTensor) else leaf


def _move(model: nn.Module) -> None:
    """Move a model to the device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(AppleTensor(parameter.data), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = AppleTensor(buffer)


class _BackendModule(_DummyBackendModule):
    """What torch asks a device's module for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _make_model(device: str) -> PreTrainedModel:
    model = make_model(kv_heads=3, channels=24, layers=3)
    model.set_attn_implementation("eager")  # the same kernels on both
    if device == _NAME:
        _move(model)
    return model


def measure(device: str) -> dict[str, list[float]]:
    """Measure, prune and repair tiny models.

    Args:
        device: `cpu` or `apple`.

    Returns:
        What was done -> its numbers.
    """
    model, batches = _make_model(device), list(make_tokens(6, 16).split(2))
    blocks, calibration = find_blocks(model), CalibrationSet(batches, accumulation=2)
    labelled = [{"input_ids": batch, "labels": batch} for batch in batches]
    found = {"perplexity": list(measure_perplexity(model, {"text": labelled}).values())}
    metrics = CorpusPerplexities(["text"]).to(device)
    for batch in batches:
        there = batch.to(device)
        metrics.update(0, model, {"input_ids": there, "labels": there})
    found["perplexity in a loop"] = [float(metrics.compute()["text"])]
    found["perplexity of generated text"] = [measure_text_perplexity(model, batches[0][:1].to(device), 4)]
    for criterion in CRITERIA:
        scores = score_units(model, blocks, calibration, criterion)
        found[f"scores of {criterion}"] = torch.cat(list(scores.values())).tolist()
    found["outliers"] = torch.cat(list(prepare_search(model, blocks, batches).score().values())).tolist()
    for method in SENSITIVITIES:
        found[f"importance by {method}"] = list(
            measure_sensitivity(model, blocks, calibration, method).importance.values()
        )
    found["damage of gates"] = [measure_damage(model, blocks, scores, {blocks[1].key: 5}, batches)]
    found |= {f"prune, {name}": _prune(device, batches, settings) for name, settings in _PRUNED.items()}
    return found


_FITTED = {"products": "float32", "epochs": 0, "distill_tokens": 0}
_PRUNED: dict[str, dict[str, Any]] = {
    "default": {"repair": {"products": "float32", "epochs": 2, "distill_tokens": 64}},
    "biases": {"criterion": "wifv", "repair": {**_FITTED, "method": "bias"}},
    "gated damage": {"damage": "scores", "allocation": "global", "rate": 0.2, "repair": _FITTED},
}


def _prune(device: str, batches: list[Tensor], settings: dict[str, Any]) -> list[float]:
    model = _make_model(device)
    prune(model, batches, PruningConfig(**settings))
    return torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()]).tolist()


def main() -> int:
    """Measure on both devices."""
    _setup_privateuseone_for_python_backend(_NAME, _BackendModule())
    precision._WITHOUT_DOUBLE = (*precision._WITHOUT_DOUBLE, _NAME)
    architecture.DTensor = AppleTensor  # it takes weights of a few types only
    console.quiet = True
    torch.set_num_threads(1)
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` moves what it has made where modes see it
    found = {"cpu": measure("cpu")}
    with AppleMode():
        found[_NAME] = measure(_NAME)
        speeds = measure_device(torch.device(_NAME), torch.float32, seconds=0.0)
        unknown = make_unknown("gemma")
        _move(unknown)
        check_compatibility(unknown)
        try:
            torch.ones(1, device=_NAME).double()
        except TypeError as error:
            found["refusal"] = str(error)
    assert speeds.double_flops > 0
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
