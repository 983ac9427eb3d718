"""Measure the damage of each layer: the divergence from the dense model if only that layer is cut and repaired.

Layers are repaired in order, so all later layers are still dense when a layer is done. A copy of some text runs through
the repaired layer and then through each later layer before its cut. No second model is needed.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.models.divergence import measure_divergences
from gqaprune.models.layerwise import embed_batches, run_copy, run_layer


class LayerDamageMeter:
    """Measures the damage of layers while they are cut in order.

    Call `run_whole` on every layer of the model, and `run_repaired` on those that were cut.

    Args:
        model: the causal LM, still dense.
        batches: this rank's token ids to measure on, each `[batch, tokens]`.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Tensor]) -> None:
        self._model = model
        self._dense = embed_batches(model, batches)
        self._inputs_BTD: list[Tensor] = []
        self._copies: dict[int, list[Tensor]] = {}

    def run_whole(self, layer: int) -> None:
        """Run all copies through a layer that is still dense."""
        for hidden in self._copies.values():
            for index, stream in enumerate(self._dense):
                hidden[index] = run_copy(self._model, layer, stream, hidden[index])
        self._inputs_BTD = [stream.hidden_BTD for stream in self._dense]
        for stream in self._dense:
            stream.hidden_BTD = run_layer(self._model, layer, stream)

    def run_repaired(self, layer: int) -> None:
        """Start a copy with the output of a repaired layer."""
        self._copies[layer] = [
            run_copy(self._model, layer, stream, input_BTD)
            for stream, input_BTD in zip(self._dense, self._inputs_BTD, strict=True)
        ]

    def measure(self) -> dict[int, float]:
        """Measure the damage of each repaired layer in nats per token, over the text of all ranks.

        Raises:
            ValueError: if a divergence is not finite, naming the layer.
        """
        named = {f"layer {layer} as repaired": hidden for layer, hidden in self._copies.items()}
        values = measure_divergences(self._model, self._dense, named)
        return dict(zip(self._copies, values.values(), strict=True))
