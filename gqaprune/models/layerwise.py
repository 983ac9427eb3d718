"""Run the decoder layer by layer over many batches, so that only one layer's inputs are in memory.

Repair and criteria of activations run a model this way: `embed_batches` once, then for every layer `run_layer` on each
stream, whose output is the next layer's input. Callers hook or change the layer between two runs.

Other functions enter a forward pass in its middle, so that layers before a changed one do not run again
(`record_layer_inputs` once, then `resume_at`), or run decoder and head separately (`run_decoder`, `run_head`).

Axes in tensor names: B samples, T tokens, D hidden width, N tokens of all samples, C columns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gqaprune.models.architecture import get_layers

K = TypeVar("K")


@dataclass
class Stream:
    """One batch on its way through the decoder.

    Args:
        hidden_BTD: input of the next layer.
        arguments: keyword arguments of every layer's call (mask, position embeddings), as the model computes them.
    """

    hidden_BTD: Tensor
    arguments: list[dict[str, Any]]


@torch.no_grad()
def embed_batches(model: PreTrainedModel, batches: Sequence[Tensor]) -> list[Stream]:
    """Compute the input of the first decoder layer for every batch, and the arguments of each layer's call.

    Args:
        model: the causal LM.
        batches: token ids, each `[batch, tokens]`.
    """
    device = next(model.parameters()).device
    streams = []
    for batch_BT in batches:
        with _record_calls(get_layers(model)) as calls:
            model.base_model(input_ids=batch_BT.to(device), use_cache=False)
        hidden_BTD = calls[0][0]
        streams.append(Stream(hidden_BTD, [arguments for _, arguments in calls]))
    return streams


@torch.no_grad()
def run_layer(model: PreTrainedModel, index: int, stream: Stream) -> Tensor:
    """Run decoder layer `index` on a stream's hidden states; return `[batch, tokens, width]`, keep the stream."""
    return _get_hidden(get_layers(model)[index](stream.hidden_BTD, **stream.arguments[index]))


def run_copy(model: PreTrainedModel, index: int, stream: Stream, hidden_BTD: Tensor) -> Tensor:
    """Run decoder layer `index` on other hidden states, from any device; return its output on the CPU."""
    changed = replace(stream, hidden_BTD=hidden_BTD.to(stream.hidden_BTD.device))
    return run_layer(model, index, changed).cpu()


@contextmanager
def watch_inputs(linears: Mapping[K, nn.Linear], receive: Callable[[K, Tensor], None]) -> Iterator[None]:
    """Pass every input of linear layers, `[tokens of all samples, columns]`, to a function within the context.

    Args:
        linears: the layers by name.
        receive: function called with name and input.
    """

    def make_hook(name: K) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: receive(name, inputs[0].flatten(0, -2))

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.callback(linear.register_forward_pre_hook(make_hook(name)).remove)
        yield


@contextmanager
def _record_calls(layers: nn.ModuleList) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Make every layer only pass its input through and record its arguments, so that a forward pass is cheap."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def pass_through(hidden_BTD: Tensor, **arguments: Any) -> Tensor:
        calls.append((hidden_BTD, arguments))
        return hidden_BTD

    with ExitStack() as restored:
        for layer in layers:
            restored.enter_context(replace_forward(layer, pass_through))
        yield calls


@torch.no_grad()
def record_layer_inputs(model: PreTrainedModel, batch_BT: Tensor) -> list[Tensor]:
    """Record the input of every decoder layer and the output of the last, each `[batch, tokens, width]`."""
    inputs_BTD: list[Tensor] = []
    layers = get_layers(model)

    def record(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs_BTD.append(arguments[0])

    def record_last(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        inputs_BTD.append(_get_hidden(output))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(record).remove)
        hooks.callback(layers[-1].register_forward_hook(record_last).remove)
        model.base_model(input_ids=batch_BT, use_cache=False)
    return inputs_BTD


@contextmanager
def record_layer_outputs(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Record outputs of decoder layers in forward passes, `[batch, tokens, width]`, with their graph, by index.

    A layer's call is wrapped from outside, so that `torch.compile`, hooks of strategies and recomputing in the backward
    pass are not affected.
    """
    outputs_BTD: dict[int, Tensor] = {}

    def wrap(index: int, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            output = call(*arguments, **keywords)
            outputs_BTD[index] = _get_hidden(output)
            return output

        return run

    with ExitStack() as restored:
        for index in layers:
            layer = get_layers(model)[index]
            compiled = layer._compiled_call_impl
            restored.callback(setattr, layer, "_compiled_call_impl", compiled)
            layer._compiled_call_impl = wrap(index, compiled or layer._call_impl)
        yield outputs_BTD


@contextmanager
def resume_at(model: PreTrainedModel, index: int, hidden_BTD: Tensor) -> Iterator[None]:
    """Make forward passes start at decoder layer `index` with these hidden states; layers before it do nothing.

    If `index` is the number of layers, only the model's head runs. Contexts can be nested: the innermost one counts.
    """
    with ExitStack() as restored:
        for layer in get_layers(model)[:index]:
            restored.enter_context(replace_forward(layer, lambda *_, **__: hidden_BTD))
        yield


@contextmanager
def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward function within the context; contexts can be nested."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def run_decoder(model: PreTrainedModel, batch_BT: Tensor) -> Tensor:
    """Compute the last decoder layer's output for token ids, `[batch, tokens, width]`, with its graph if any."""
    outputs_BTD: list[Tensor] = []
    last = get_layers(model)[-1]
    handle = last.register_forward_hook(lambda _, __, output: outputs_BTD.append(_get_hidden(output)))
    try:
        model.base_model(input_ids=batch_BT, use_cache=False)
    finally:
        handle.remove()
    return outputs_BTD[0]


def run_head(model: PreTrainedModel, hidden_BTD: Tensor) -> Tensor:
    """Compute logits `[batch, tokens, vocabulary]` from the last decoder layer's output: final norm, head, scaling."""
    # Any token ids of that shape work, because their embeddings are not used.
    ids_BT = torch.zeros(hidden_BTD.shape[:2], dtype=torch.long, device=hidden_BTD.device)
    # Experts do not run, so there is no routing to balance.
    routing = {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}
    with resume_at(model, len(get_layers(model)), hidden_BTD):
        logits_BTV: Tensor = model(input_ids=ids_BT, use_cache=False, return_dict=True, **routing).logits
    return logits_BTV


def _get_hidden(output: Any) -> Tensor:
    hidden_BTD: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden_BTD
