"""Describe where a model comes from: loaded whole, with layers on disk or sharded, or already in memory."""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig, PreTrainedModel

from gqaprune.models.dtypes import DTYPES, check_dtype, read_dtype
from gqaprune.models.loading import build_without_weights, load_model
from gqaprune.models.sources import load_config
from gqaprune.placement.loading_by_layer import can_read_by_layer, load_offloaded_model, load_sharded_model


@dataclass(frozen=True)
class ModelSource:
    """A causal LM's name, and how its weights are loaded.

    Args:
        pretrained: a folder, a `.gguf` file, a hub name, or `smollm2-135m` (the embedded model).
        dtype: type of the weights: `float32`, `bfloat16`, `float16`, or `auto` (the type in the checkpoint).
        attn_implementation: attention kernel; None lets transformers choose.
        trust_remote_code: run code that comes with the checkpoint.
    """

    pretrained: str
    dtype: str = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def read_config(self) -> PretrainedConfig:
        """Read the model's config, before anything is cut.

        Raises:
            ValueError: like `load_config`.
        """
        return load_config(self.pretrained, self.trust_remote_code)

    def build_without_weights(self) -> PreTrainedModel:
        """Build the model as it would be loaded, with shapes but without values.

        Raises:
            ValueError: like `load_config`.
        """
        return build_without_weights(self.read_config(), self.trust_remote_code, self.attn_implementation)

    @property
    def loaded_dtype(self) -> torch.dtype:
        """The type of the weights after loading.

        Raises:
            ValueError: if its name is not in `DTYPES`.
        """
        check_dtype(self.dtype)
        named = DTYPES[self.dtype]
        return named if isinstance(named, torch.dtype) else read_dtype(self.read_config()) or torch.float32

    def build_in_its_type(self) -> PreTrainedModel:
        """Build the model without values, with parameters in the type in which they would be loaded."""
        return self.build_without_weights().to(self.loaded_dtype)

    def name_another(self, pretrained: str, dtype: str, trust_remote_code: bool) -> "ModelSource":
        """Return the source of another model, loaded with the same attention kernel."""
        return ModelSource(pretrained, dtype, self.attn_implementation, trust_remote_code)

    def load(self) -> PreTrainedModel:
        """Load the whole model into memory.

        Raises:
            ValueError: like `load_model`.
        """
        return load_model(self.pretrained, self.dtype, self.attn_implementation, self.trust_remote_code)

    def load_offloaded(self, folder: Path) -> PreTrainedModel:
        """Load a model to prune whose decoder layers stay on disk; changed layers are kept beside `folder`.

        Raises:
            ValueError: like `load_offloaded_model`.
        """
        return load_offloaded_model(
            self.pretrained, folder, self.dtype, self.attn_implementation, self.trust_remote_code
        )

    def load_sharded(self, mesh: DeviceMesh) -> PreTrainedModel:
        """Load a model whose decoder layers are sharded over the devices of a mesh. Every rank calls it.

        Raises:
            ValueError: like `load_sharded_model`.
        """
        return load_sharded_model(self.pretrained, mesh, self.dtype, self.attn_implementation, self.trust_remote_code)

    @property
    def can_be_read_by_layer(self) -> bool:
        """Whether `load_offloaded` and `load_sharded` can load it, because its layers can be read one by one.

        Raises:
            ValueError: like `can_read_by_layer`.
        """
        return can_read_by_layer(self.pretrained, self.trust_remote_code)


@dataclass(frozen=True)
class ModelInMemory(ModelSource):
    """A causal LM that the caller has loaded; it is changed in place, so the dense model no longer exists afterwards.

    Args:
        model: the causal LM. `pretrained` is its own name, which may be empty.
    """

    model: PreTrainedModel = field(kw_only=True)
    _config: PretrainedConfig = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_config", copy.deepcopy(self.model.config))

    def read_config(self) -> PretrainedConfig:
        """Return the config that the model had at first."""
        return self._config

    def load(self) -> PreTrainedModel:
        """Raise an error, because the model in memory has no name or folder to load it from again.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "the dense model is needed again, but it was passed in memory and is cut by now: pass its folder or name "
            "to CausalLMModule instead"
        )

    @property
    def loaded_dtype(self) -> torch.dtype:
        """The type of its weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def can_be_read_by_layer(self) -> bool:
        """False, because it is in memory."""
        return False
