"""Batches on their way through the decoder while it is cut block by block and, beside it, through the dense model.

What is known is not computed again: streams stop at the output of the block that is looked at, attention that stays
whole is not run anew for the MLP after it, and a layer is left from the MLP's input on.

Axes in tensor names: B samples, T tokens, N tokens of all samples, D hidden width, C columns of an output projection.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from gqaprune.models.architecture import Block, compute_addition, get_module
from gqaprune.models.families import FAMILIES
from gqaprune.models.layerwise import Stream, embed_batches, replace_forward, run_layer
from gqaprune.plan import BlockKey, BlockKind
from gqaprune.surgery.refinement import TokenPairs


@dataclass(frozen=True)
class BlockActivations:
    """What a block that is still whole takes and gives on one batch.

    Args:
        input_BTD: input of its first projections.
        x_BTC: input of its output projection.
        output_BTD: output of that projection.
        before_BTD: the hidden states that the block adds to.
        dense_BTD: the dense model's hidden states after the block; None where they are not computed.
        is_held_out: whether the batch is held out.
    """

    input_BTD: Tensor
    x_BTC: Tensor
    output_BTD: Tensor
    before_BTD: Tensor
    dense_BTD: Tensor | None
    is_held_out: bool


class Streams:
    """Batches that pass the decoder layers in order, each layer within `enter_layer`.

    Args:
        model: the causal LM, each of whose layers is cut while it is entered.
        batches: this rank's token ids, each `[batch, tokens]`.
        are_held_out: whether each is held out.
        dense_from: layer from which on the dense model's hidden states are computed, too; None where never. Up to it
            they are those of the model.
        last: layer whose output nobody needs: later ones are entered and left with no streams.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Tensor],
        are_held_out: Sequence[bool],
        dense_from: int | None,
        last: int,
    ) -> None:
        self._model, self._are_held_out = model, are_held_out
        self._dense_from, self._last = dense_from, last
        self._pruned = embed_batches(model, batches)
        self._dense: list[Stream] = []

    @contextmanager
    def enter_layer(self, attention: Block, needs_dense_attention: bool) -> Iterator["LayerStreams"]:
        """Run the dense model's streams through a layer that is still whole; at the end, the others through what it is.

        Args:
            attention: the layer's.
            needs_dense_attention: whether the dense model's hidden states after it are asked for, besides those after
                the MLP.
        """
        layer = attention.key.layer
        if layer == self._dense_from:
            self._dense = [replace(stream) for stream in self._pruned]
        dense_BTD = self._run_dense(attention, needs_dense_attention)
        streams = LayerStreams(self._model, self._pruned, self._are_held_out, attention, dense_BTD)
        yield streams
        if layer == self._last:
            self._pruned, self._dense, self._are_held_out = [], [], []
            streams._close()
        else:
            streams._leave()

    def _run_dense(self, attention: Block, needs_dense_attention: bool) -> dict[BlockKind, list[Tensor]]:
        """Hidden states of the dense model after a layer's blocks; empty lists where they are not computed."""
        dense_BTD: dict[BlockKind, list[Tensor]] = {"attention": [], "mlp": []}
        outputs_BTD: list[Tensor] = []
        handle = attention.output.register_forward_hook(lambda _, __, output: outputs_BTD.append(output))
        try:
            for stream in self._dense:
                before_BTD, stream.hidden_BTD = stream.hidden_BTD, run_layer(self._model, attention.key.layer, stream)
                output_BTD = outputs_BTD.pop()
                if needs_dense_attention:
                    added_BTD = compute_addition(self._model, attention.key, output_BTD)
                    dense_BTD["attention"].append(before_BTD + added_BTD)
                dense_BTD["mlp"].append(stream.hidden_BTD)
        finally:
            handle.remove()
        return dense_BTD


class LayerStreams:
    """Streams at one layer, within `Streams.enter_layer`: `run_to` its attention, then its MLP, or only one of them.

    Args:
        model: the causal LM.
        streams: at the layer's input.
        are_held_out: whether each is held out.
        attention: the layer's.
        dense_BTD: the dense model's hidden states after each block, one tensor per stream, or none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        streams: Sequence[Stream],
        are_held_out: Sequence[bool],
        attention: Block,
        dense_BTD: Mapping[BlockKind, list[Tensor]],
    ) -> None:
        self._model, self._streams, self._are_held_out = model, streams, are_held_out
        self._attention, self._dense_BTD = attention, dict(dense_BTD)
        self._ahead: list[BlockKind] = ["attention", "mlp"]
        self._attended_BTC: list[Tensor] = []
        self._mlp_tokens: tuple[TokenPairs, TokenPairs] | None = None

    def count_tokens(self) -> tuple[int, int]:
        """Of streams to fit on, and of held-out ones."""
        counts = [0, 0]
        for stream, is_held_out in zip(self._streams, self._are_held_out, strict=True):
            counts[is_held_out] += stream.hidden_BTD.shape[:2].numel()
        return counts[0], counts[1]

    def run_to(
        self, block: Block, *, is_mlp_next: bool = False, mlp_tokens: tuple[TokenPairs, TokenPairs] | None = None
    ) -> Iterator[BlockActivations]:
        """Run the streams through the layer up to a block's output; what follows that is not run.

        Args:
            block: the layer's attention or MLP, still whole.
            is_mlp_next: whether the MLP is run to after it, while all of this attention's units stay.
            mlp_tokens: where the caller puts this MLP's inputs, of streams to fit on and of held-out ones. The layer is
                left from them on instead of from its input.
        """
        assert block.key.layer == self._attention.key.layer and block.key.kind in self._ahead, (
            f"streams cannot run to {block.key}: ahead of them are {self._ahead} of layer {self._attention.key.layer}"
        )
        del self._ahead[: self._ahead.index(block.key.kind) + 1]
        return self._run_to(block, is_mlp_next, mlp_tokens)

    def _run_to(
        self, block: Block, is_mlp_next: bool, mlp_tokens: tuple[TokenPairs, TokenPairs] | None
    ) -> Iterator[BlockActivations]:
        keeps_attended = is_mlp_next and self._model.config.model_type in FAMILIES  # whose attention gives no more
        dense_BTD = self._dense_BTD.pop(block.key.kind)
        self._mlp_tokens = mlp_tokens
        inputs_BTD: list[Tensor] = []
        outputs_BTD: list[Tensor] = []
        calls: list[tuple[Tensor, Tensor]] = []

        def stop(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls.append((inputs[0], output))
            raise _BlockReachedError

        for index, stream in enumerate(self._streams):
            with ExitStack() as hooks:
                first, record = block.inputs[0].linear, self._attention.output.register_forward_hook
                hooks.callback(first.register_forward_pre_hook(lambda _, inputs: inputs_BTD.append(inputs[0])).remove)
                hooks.callback(record(lambda _, __, output: outputs_BTD.append(output)).remove)
                hooks.callback(block.output.register_forward_hook(stop).remove)
                if block.key.kind == "mlp" and self._attended_BTC:
                    hooks.enter_context(self._replace_attention(self._attended_BTC.pop(0)))
                hooks.enter_context(suppress(_BlockReachedError))
                run_layer(self._model, block.key.layer, stream)
            input_BTD, attended_BTD, (x_BTC, output_BTD) = inputs_BTD.pop(), outputs_BTD.pop(), calls.pop()
            if keeps_attended:
                self._attended_BTC.append(x_BTC)
            before_BTD = stream.hidden_BTD
            if block.key.kind == "mlp":
                before_BTD = before_BTD + compute_addition(self._model, self._attention.key, attended_BTD)
            if mlp_tokens is not None:
                stream.hidden_BTD = before_BTD
            # MLPs beside experts see no samples.
            input_BTD, x_BTC, output_BTD = (
                tensor.view(*before_BTD.shape[:2], -1) for tensor in (input_BTD, x_BTC, output_BTD)
            )
            after_BTD = dense_BTD[index] if dense_BTD else None
            yield BlockActivations(input_BTD, x_BTC, output_BTD, before_BTD, after_BTD, self._are_held_out[index])

    def _replace_attention(self, x_BTC: Tensor) -> AbstractContextManager[None]:
        """Attention gives what its output projection, as it is now, makes of a known input."""
        known_BTD = self._attention.output(x_BTC)
        return replace_forward(get_module(self._model, self._attention.key), lambda *_, **__: (known_BTD, None))

    def _leave(self) -> None:
        """Run the streams to the layer's output, as the layer is now."""
        tokens = self._mlp_tokens
        self._close()
        if tokens is not None:
            self._run_mlp(tokens)
            return
        for stream in self._streams:
            stream.hidden_BTD = run_layer(self._model, self._attention.key.layer, stream)

    def _run_mlp(self, tokens: tuple[TokenPairs, TokenPairs]) -> None:
        """Run the MLP on its known inputs and add its output to the hidden states before it, where the streams are."""
        key, done = BlockKey(self._attention.key.layer, "mlp"), [0, 0]
        mlp = get_module(self._model, key)
        for stream, is_held_out in zip(self._streams, self._are_held_out, strict=True):
            count = stream.hidden_BTD.shape[:2].numel()
            x_ND = tokens[is_held_out].x_ND[done[is_held_out] :][:count].to(stream.hidden_BTD.device)
            done[is_held_out] += count
            output_BTD = mlp(x_ND.view_as(stream.hidden_BTD))
            stream.hidden_BTD = stream.hidden_BTD + compute_addition(self._model, key, output_BTD)

    def _close(self) -> None:
        """Run to no block any more, and let go what was kept for it."""
        self._ahead, self._attended_BTC, self._dense_BTD, self._mlp_tokens = [], [], {}, None


class _BlockReachedError(Exception):
    """Ends a layer's forward once a block's output is there; never leaves this file."""
