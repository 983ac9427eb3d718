"""Run batches through the decoder while it is cut block by block, and at the same time through the dense decoder.

Nothing is computed twice if that can be avoided: a forward stops at the output of the current block, uncut attention is
not run again for the MLP after it, and the rest of a layer is run from the MLP's input.

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
    """Inputs and outputs of a block on one batch, before the block is cut.

    Args:
        input_BTD: input of the block's input projections.
        x_BTC: input of its output projection.
        output_BTD: output of its output projection.
        before_BTD: hidden states that the block's output is added to.
        dense_BTD: the dense model's hidden states after the block; None if they are not computed.
        is_held_out: whether the batch is held out.
    """

    input_BTD: Tensor
    x_BTC: Tensor
    output_BTD: Tensor
    before_BTD: Tensor
    dense_BTD: Tensor | None
    is_held_out: bool


class Streams:
    """Hidden states of batches, run through the decoder layers in order; each layer is cut within `enter_layer`.

    Args:
        model: the causal LM.
        batches: this rank's token ids, each `[batch, tokens]`.
        are_held_out: whether each batch is held out.
        dense_from: layer from which the dense model's hidden states are computed as well; before it they are equal to
            the pruned model's. None for never.
        last_layer: last layer whose activations are needed. Its output is not computed, and later layers have no
            streams.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Tensor],
        are_held_out: Sequence[bool],
        dense_from: int | None,
        last_layer: int,
    ) -> None:
        self._model, self._are_held_out = model, are_held_out
        self._dense_from, self._last_layer = dense_from, last_layer
        self._pruned = embed_batches(model, batches)
        self._dense: list[Stream] = []

    @contextmanager
    def enter_layer(self, attention: Block, needs_dense_attention: bool) -> Iterator["LayerStreams"]:
        """Run the dense streams through a layer before it is cut and, on leaving the context, the others after it is.

        Args:
            attention: the layer's attention block.
            needs_dense_attention: whether the dense model's hidden states after attention are needed, as well as those
                after the MLP.
        """
        layer = attention.key.layer
        if layer == self._dense_from:
            self._dense = [replace(stream) for stream in self._pruned]
        dense_BTD = self._run_dense(attention, needs_dense_attention)
        streams = LayerStreams(self._model, self._pruned, self._are_held_out, attention, dense_BTD)
        yield streams
        if layer == self._last_layer:
            self._pruned, self._dense, self._are_held_out = [], [], []
            streams._close()
        else:
            streams._finish_layer()

    def _run_dense(self, attention: Block, needs_dense_attention: bool) -> dict[BlockKind, list[Tensor]]:
        """Return the dense model's hidden states after each block of a layer; empty lists if they are not computed."""
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
    """Streams at one layer, within `Streams.enter_layer`. Call `run_to` for its attention, its MLP, or both in order.

    Args:
        model: the causal LM.
        streams: streams at the layer's input.
        are_held_out: whether each stream is held out.
        attention: the layer's attention block.
        dense_BTD: the dense model's hidden states after each block, one tensor per stream; empty if not computed.
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
        """Count the tokens of the streams to fit on and of the held-out streams."""
        counts = [0, 0]
        for stream, is_held_out in zip(self._streams, self._are_held_out, strict=True):
            counts[is_held_out] += stream.hidden_BTD.shape[:2].numel()
        return counts[0], counts[1]

    def run_to(
        self, block: Block, *, is_mlp_next: bool = False, mlp_tokens: tuple[TokenPairs, TokenPairs] | None = None
    ) -> Iterator[BlockActivations]:
        """Run the streams through the layer up to the output of a block, and no further.

        Args:
            block: the layer's attention or MLP, still dense.
            is_mlp_next: whether this is attention that stays whole and `run_to` the MLP will follow. Its result is then
                reused.
            mlp_tokens: buffers that the caller fills with this MLP's inputs, for streams to fit on and held-out ones.
                The rest of the layer is then run from there instead of from the layer's input.
        """
        assert block.key.layer == self._attention.key.layer and block.key.kind in self._ahead, (
            f"streams cannot run to {block.key}: {self._ahead} of layer {self._attention.key.layer} are left"
        )
        del self._ahead[: self._ahead.index(block.key.kind) + 1]
        return self._run_to(block, is_mlp_next, mlp_tokens)

    def _run_to(
        self, block: Block, is_mlp_next: bool, mlp_tokens: tuple[TokenPairs, TokenPairs] | None
    ) -> Iterator[BlockActivations]:
        # Attention of unknown families may add more than the output of its output projection.
        keeps_attended = is_mlp_next and self._model.config.model_type in FAMILIES
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
                projection, attention_output = block.inputs[0].linear, self._attention.output
                for handle in (
                    projection.register_forward_pre_hook(lambda _, inputs: inputs_BTD.append(inputs[0])),
                    attention_output.register_forward_hook(lambda _, __, output: outputs_BTD.append(output)),
                    block.output.register_forward_hook(stop),
                ):
                    hooks.callback(handle.remove)
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
            # MLPs beside experts get tokens without a batch axis.
            input_BTD, x_BTC, output_BTD = (
                tensor.view(*before_BTD.shape[:2], -1) for tensor in (input_BTD, x_BTC, output_BTD)
            )
            after_BTD = dense_BTD[index] if dense_BTD else None
            yield BlockActivations(input_BTD, x_BTC, output_BTD, before_BTD, after_BTD, self._are_held_out[index])

    def _replace_attention(self, x_BTC: Tensor) -> AbstractContextManager[None]:
        """Replace attention by its output projection, as it is now, applied to a known input."""
        known_BTD = self._attention.output(x_BTC)
        return replace_forward(get_module(self._model, self._attention.key), lambda *_, **__: (known_BTD, None))

    def _finish_layer(self) -> None:
        """Run the streams to the output of the layer as it is now."""
        tokens = self._mlp_tokens
        self._close()
        if tokens is not None:
            self._run_mlp(tokens)
            return
        for stream in self._streams:
            stream.hidden_BTD = run_layer(self._model, self._attention.key.layer, stream)

    def _run_mlp(self, tokens: tuple[TokenPairs, TokenPairs]) -> None:
        """Run the MLP on its recorded inputs and add its output to the streams, which are at the MLP's input."""
        key, starts = BlockKey(self._attention.key.layer, "mlp"), [0, 0]
        mlp = get_module(self._model, key)
        for stream, is_held_out in zip(self._streams, self._are_held_out, strict=True):
            count = stream.hidden_BTD.shape[:2].numel()
            x_ND = tokens[is_held_out].x_ND[starts[is_held_out] :][:count].to(stream.hidden_BTD.device)
            starts[is_held_out] += count
            output_BTD = mlp(x_ND.view_as(stream.hidden_BTD))
            stream.hidden_BTD = stream.hidden_BTD + compute_addition(self._model, key, output_BTD)

    def _close(self) -> None:
        """Allow no further `run_to`, and release what was kept for it."""
        self._ahead, self._attended_BTC, self._dense_BTD, self._mlp_tokens = [], [], {}, None


class _BlockReachedError(Exception):
    """Stops a layer's forward at a block's output; never leaves this file."""
