"""Where a model is loaded from, and the three ways to load it: whole, layers on disk, layers sharded over devices."""

from dataclasses import dataclass
from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from gqaprune.models.loading import build_without_weights, load_model
from gqaprune.models.sources import load_config
from gqaprune.placement.loading_by_layer import can_read_by_layer, load_offloaded_model, load_sharded_model


@dataclass(frozen=True)
class ModelSource:
    """Name a causal LM and say how its weights are loaded.

    Args:
        pretrained: a folder, a `.gguf` file, a hub name, or `smollm2-135m` (the embedded model).
        dtype: type of the weights: `float32`, `bfloat16`, `float16`, or `auto` (the checkpoint's own).
        attn_implementation: attention kernel; transformers chooses if None.
        trust_remote_code: run code that comes with the checkpoint.
    """

    pretrained: str
    dtype: str = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def build_without_weights(self) -> PreTrainedModel:
        """Build the model as it would be loaded, its parameters shapes alone.

        Raises:
            ValueError: as `load_config`.
        """
        config = load_config(self.pretrained, self.trust_remote_code)
        return build_without_weights(config, self.trust_remote_code, self.attn_implementation)

    def load(self) -> PreTrainedModel:
        """Load the whole model into memory.

        Raises:
            ValueError: as `load_model`.
        """
        return load_model(self.pretrained, self.dtype, self.attn_implementation, self.trust_remote_code)

    def load_offloaded(self, folder: Path) -> PreTrainedModel:
        """Load a model to prune whose decoder layers stay on disk; layers that change are kept beside `folder`.

        Raises:
            ValueError: as `load_offloaded_model`.
        """
        return load_offloaded_model(
            self.pretrained, folder, self.dtype, self.attn_implementation, self.trust_remote_code
        )

    def load_sharded(self, mesh: DeviceMesh) -> PreTrainedModel:
        """Load a model whose decoder layers are sharded over the devices of a mesh. Every rank calls it.

        Raises:
            ValueError: as `load_sharded_model`.
        """
        return load_sharded_model(self.pretrained, mesh, self.dtype, self.attn_implementation, self.trust_remote_code)

    @property
    def can_be_read_by_layer(self) -> bool:
        """Whether `load_offloaded` and `load_sharded` can load it: its layers are stored one by one.

        Raises:
            ValueError: as `can_read_by_layer`.
        """
        return can_read_by_layer(self.pretrained, self.trust_remote_code)
