"""What each layer's cut did: the divergence from the dense model if that layer alone is as repair left it.

Layers are repaired in order, so that those after a layer are still whole when it is done: a copy of some text passes it
as it is now, and each later one before its cut. No dense model is kept.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.models.divergence import measure_divergences
from gqaprune.models.layerwise import embed_batches, run_copy, run_layer


class LayerDamageMeter:
    """Measures the damage of layers while they are cut in order; every layer of the model has to be run through.

    Args:
        model: the causal LM, still whole.
        batches: this rank's token ids to measure on, each `[batch, tokens]`.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Tensor]) -> None:
        self._model = model
        self._dense = embed_batches(model, batches)
        self._inputs_BTD: list[Tensor] = []
        self._copies: dict[int, list[Tensor]] = {}

    def run_whole(self, layer: int) -> None:
        """Run all copies through a layer that is still whole."""
        for hidden in self._copies.values():
            for index, stream in enumerate(self._dense):
                hidden[index] = run_copy(self._model, layer, stream, hidden[index])
        self._inputs_BTD = [stream.hidden_BTD for stream in self._dense]
        for stream in self._dense:
            stream.hidden_BTD = run_layer(self._model, layer, stream)

    def run_repaired(self, layer: int) -> None:
        """Begin a copy with a layer as repair left it."""
        self._copies[layer] = [
            run_copy(self._model, layer, stream, input_BTD)
            for stream, input_BTD in zip(self._dense, self._inputs_BTD, strict=True)
        ]

    def measure(self) -> dict[int, float]:
        """Damage of each layer in nats per token, all ranks' together.

        Raises:
            ValueError: if one is not finite, with the layer.
        """
        named = {f"layer {layer} as repaired": hidden for layer, hidden in self._copies.items()}
        values = measure_divergences(self._model, self._dense, named)
        return dict(zip(self._copies, values.values(), strict=True))
