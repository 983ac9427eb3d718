"""Repair's way through the decoder: a model that is cut block by block and, beside it, the dense one it was.

What is known is not computed again: streams stop at the output of the block that is looked at, attention that stays
whole is not run anew for the MLP after it, and a layer is left from the MLP's input on.

Axes in tensor names: B samples, T tokens, N tokens of all samples, D hidden width, C columns of an output projection.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from gqaprune.models.architecture import Block, compute_addition, get_module
from gqaprune.models.families import FAMILIES
from gqaprune.models.layerwise import Stream, embed_batches, replace_forward, run_layer
from gqaprune.plan import BlockKey, BlockKind
from gqaprune.surgery.refinement import TokenPairs


@dataclass(frozen=True)
class Passage:
    """One stream at the output of a block that is still whole.

    Args:
        input_BTD: input of its first projections.
        x_BTC: input of its output projection.
        output_BTD: what that gives.
        before_BTD: the hidden states that the block adds to.
        goal_BTD: the dense model's hidden states after the block; None where it does not go along.
        is_held: whether the stream is held out.
    """

    input_BTD: Tensor
    x_BTC: Tensor
    output_BTD: Tensor
    before_BTD: Tensor
    goal_BTD: Tensor | None
    is_held: bool


class Walk:
    """Streams through the decoder layers, one layer after the other; of each, `enter`, `run_to` its blocks, `leave`.

    Args:
        model: the causal LM, whose layers are cut between `enter` and `leave`.
        batches: this rank's token ids, each `[batch, tokens]`.
        are_held: whether each is held out.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Tensor], are_held: Sequence[bool]) -> None:
        self.model, self.are_held = model, are_held
        self._pruned = embed_batches(model, batches)
        self._dense: list[Stream] = []
        self._goals_BTD: dict[BlockKind, list[Tensor]] = {}
        self._attended_BTC: list[Tensor] = []

    def count_tokens(self) -> tuple[int, int]:
        """Of streams to fit on, and of held-out ones."""
        counts = [0, 0]
        for stream, is_held in zip(self._pruned, self.are_held, strict=True):
            counts[is_held] += stream.hidden_BTD.shape[:2].numel()
        return counts[0], counts[1]

    def branch_off(self) -> None:
        """Let the dense model go along from here: until now the two were one."""
        self._dense = [replace(stream) for stream in self._pruned]

    def enter(self, attention: Block, has_goal: bool) -> None:
        """Come to a layer that is still whole; the dense model's streams pass it.

        Args:
            attention: the layer's.
            has_goal: whether its goals are asked for, besides the MLP's.
        """
        self._attention, self._attended_BTC = attention, []
        self._goals_BTD = {"attention": [], "mlp": []}
        outputs_BTD: list[Tensor] = []
        handle = attention.output.register_forward_hook(lambda _, __, output: outputs_BTD.append(output))
        try:
            for stream in self._dense:
                before_BTD, stream.hidden_BTD = stream.hidden_BTD, run_layer(self.model, attention.key.layer, stream)
                output_BTD = outputs_BTD.pop()
                if has_goal:
                    added_BTD = compute_addition(self.model, attention.key, output_BTD)
                    self._goals_BTD["attention"].append(before_BTD + added_BTD)
                self._goals_BTD["mlp"].append(stream.hidden_BTD)
        finally:
            handle.remove()

    def run_to(self, block: Block, *, is_mlp_next: bool = False, waits: bool = False) -> Iterator[Passage]:
        """Run the streams through the layer up to a block's output; what follows that is not run.

        Args:
            block: the layer's attention or MLP, still whole.
            is_mlp_next: whether the MLP is run to after it, while all of this attention's units stay.
            waits: leave the streams at the hidden states that this MLP adds to, for `leave` to go on from.
        """
        keeps_attended = is_mlp_next and self.model.config.model_type in FAMILIES  # whose attention gives no more
        goals_BTD = self._goals_BTD.pop(block.key.kind)
        inputs_BTD: list[Tensor] = []
        outputs_BTD: list[Tensor] = []
        calls: list[tuple[Tensor, Tensor]] = []

        def stop(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls.append((inputs[0], output))
            raise _BlockReachedError

        for index, stream in enumerate(self._pruned):
            with ExitStack() as hooks:
                first, record = block.inputs[0].linear, self._attention.output.register_forward_hook
                hooks.callback(first.register_forward_pre_hook(lambda _, inputs: inputs_BTD.append(inputs[0])).remove)
                hooks.callback(record(lambda _, __, output: outputs_BTD.append(output)).remove)
                hooks.callback(block.output.register_forward_hook(stop).remove)
                if block.key.kind == "mlp" and self._attended_BTC:
                    hooks.enter_context(self._replace_attention(self._attended_BTC.pop(0)))
                hooks.enter_context(suppress(_BlockReachedError))
                run_layer(self.model, block.key.layer, stream)
            input_BTD, attended_BTD, (x_BTC, output_BTD) = inputs_BTD.pop(), outputs_BTD.pop(), calls.pop()
            if keeps_attended:
                self._attended_BTC.append(x_BTC)
            before_BTD = stream.hidden_BTD
            if block.key.kind == "mlp":
                before_BTD = before_BTD + compute_addition(self.model, self._attention.key, attended_BTD)
            if waits:
                stream.hidden_BTD = before_BTD
            # MLPs beside experts see no samples.
            input_BTD, x_BTC, output_BTD = (
                tensor.view(*before_BTD.shape[:2], -1) for tensor in (input_BTD, x_BTC, output_BTD)
            )
            goal_BTD = goals_BTD[index] if goals_BTD else None
            yield Passage(input_BTD, x_BTC, output_BTD, before_BTD, goal_BTD, self.are_held[index])

    def leave(self, tokens: tuple[TokenPairs, TokenPairs] | None) -> None:
        """Run the streams to the layer's output, as the layer is now.

        Args:
            tokens: what the MLP takes, on streams to fit on and on held-out ones, where the streams wait before it;
                None where they are at the layer's input.
        """
        if tokens is None:
            for stream in self._pruned:
                stream.hidden_BTD = run_layer(self.model, self._attention.key.layer, stream)
            return
        key, done = BlockKey(self._attention.key.layer, "mlp"), [0, 0]
        mlp = get_module(self.model, key)
        for stream, is_held in zip(self._pruned, self.are_held, strict=True):
            count = stream.hidden_BTD.shape[:2].numel()
            x_ND = tokens[is_held].x_ND[done[is_held] :][:count].to(stream.hidden_BTD.device)
            done[is_held] += count
            output_BTD = mlp(x_ND.view_as(stream.hidden_BTD))
            stream.hidden_BTD = stream.hidden_BTD + compute_addition(self.model, key, output_BTD)

    def end(self) -> None:
        """Let all streams go: later layers are entered and left with none."""
        self._dense, self._pruned, self._goals_BTD, self._attended_BTC, self.are_held = [], [], {}, [], []

    def _replace_attention(self, x_BTC: Tensor) -> AbstractContextManager[None]:
        """Attention gives what its output projection, as it is now, makes of a known input."""
        known_BTD = self._attention.output(x_BTC)
        return replace_forward(get_module(self.model, self._attention.key), lambda *_, **__: (known_BTD, None))


class _BlockReachedError(Exception):
    """Ends a layer's forward once a block's output is there; never leaves this file."""
