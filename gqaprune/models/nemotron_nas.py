"""Read and write Nemotron-NAS (DeciLM) configs: Llamas whose layers differ in width, for serving engines.

vLLM, SGLang and TensorRT-LLM have the architecture built in, and read its config with a class that comes with the
checkpoint; mlx-lm reads the config directly. The width of an MLP follows from `ffn_mult` and is a multiple of 256.

Source: mlx_lm/models/nemotron-nas.py, vllm/model_executor/models/nemotron_nas.py.
"""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from gqaprune.geometry import Geometry
from gqaprune.models.architecture import find_oddity, read_geometry, write_geometry

MODEL_TYPE = "nemotron-nas"
CONFIGURATION_FILE = "configuration_decilm.py"

_WIDTH_MULTIPLE = 256
_FAMILIES = ("llama", "mistral", "qwen2")
_ACTIVE = {"no_op": False, "replace_with_linear": False}


class BlockConfig(dict[str, Any]):
    """A block's settings, which engines read as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class DeciLMConfig(LlamaConfig):
    """A Llama's config with the settings of each layer's blocks."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Sequence[dict[str, Any]] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [
            BlockConfig({kind: BlockConfig(settings) for kind, settings in blocks.items()}) for blocks in block_configs
        ]


def write_configuration_source() -> str:
    """Write the source of the configuration file: `BlockConfig` and `DeciLMConfig`, for plain transformers."""
    return (
        '"""The config of a Llama whose layers differ in width. Written by gqaprune."""\n\n'
        "from collections.abc import Sequence\n"
        "from typing import Any\n\n"
        "from transformers import LlamaConfig\n\n\n"
        f"{inspect.getsource(BlockConfig)}\n\n"
        f"{inspect.getsource(DeciLMConfig)}"
    )


def check_can_be_nemotron_nas(config: PretrainedConfig) -> None:
    """Raise an error if Nemotron-NAS cannot store a model.

    Raises:
        ValueError: with the part that it cannot store.
    """
    if config.model_type not in _FAMILIES:
        raise ValueError(
            f"nemotron-nas supports {', '.join(_FAMILIES)} models, got {config.model_type!r}; use per-layer or padded"
        )
    geometry = read_geometry(config)
    if oddity := find_oddity(config) or ("biases of MLPs" if getattr(config, "mlp_bias", False) else ""):
        raise ValueError(f"nemotron-nas cannot store {oddity}; use per-layer or padded")
    width = geometry.hidden_size
    for layer, heads in enumerate(geometry.query_heads):
        if heads * geometry.head_dim != width:
            raise ValueError(
                f"nemotron-nas needs query heads that fill the hidden size of {width}, but layer {layer} has {heads} "
                f"heads of {geometry.head_dim}: prune only MLP channels, or use per-layer or padded"
            )


def find_nemotron_nas_shapes(config: PretrainedConfig) -> Geometry:
    """Find a model's shapes in the files: each width is rounded up to a multiple of 256."""
    geometry = read_geometry(config)
    channels = tuple(ceil(width / _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE for width in geometry.channels)
    return replace(geometry, family="llama", channels=channels)


def describe_as_nemotron_nas(config: PretrainedConfig) -> dict[str, Any]:
    """Make the content of `config.json` for a model, with the shapes of `find_nemotron_nas_shapes`."""
    geometry = find_nemotron_nas_shapes(config)
    known = {field.name for field in dataclasses.fields(LlamaConfig)}
    rope = {"rope_type": "default", **config.rope_parameters}
    theta = rope.pop("rope_theta")
    return {
        **{name: value for name, value in config.to_dict().items() if name in known - {"rope_parameters"}},
        "model_type": MODEL_TYPE,
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CONFIGURATION_FILE.removesuffix('.py')}.{DeciLMConfig.__name__}"},
        "attention_bias": has_attention_bias(config),
        "head_dim": geometry.head_dim,
        "num_attention_heads": geometry.query_heads[0],
        "num_key_value_heads": max(geometry.kv_heads),
        "intermediate_size": max(geometry.channels),
        # mlx-lm knows only these old names, and the other engines know both.
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "block_configs": [
            {
                "attention": {"n_heads_in_group": ratio, **_ACTIVE},
                "ffn": {"ffn_mult": round(3 * width / (2 * geometry.hidden_size), 6), **_ACTIVE},
            }
            for ratio, width in zip(geometry.ratios, geometry.channels, strict=True)
        ],
    }


def has_attention_bias(config: PretrainedConfig) -> bool:
    """Return whether q, k and v projections have biases; Nemotron-NAS then also has one in the output projection."""
    return config.model_type == "qwen2" or getattr(config, "attention_bias", False)


def read_nemotron_nas(values: Mapping[str, Any]) -> LlamaConfig:
    """Read a Nemotron-NAS config as a Llama's.

    Args:
        values: content of `config.json`.

    Raises:
        ValueError: if a layer lacks its attention or MLP, or has a linear layer instead.
    """
    blocks = values["block_configs"]
    for layer, kinds in enumerate(blocks):
        for kind, settings in kinds.items():
            if settings.get("no_op") or settings.get("replace_with_linear"):
                raise ValueError(
                    f"layer {layer} has no {kind} block, or a linear layer instead, which is not supported"
                )
    others = ("block_configs", "model_type", "architectures", "auto_map")
    config = LlamaConfig(**{name: value for name, value in values.items() if name not in others})
    heads, width = config.num_attention_heads, config.hidden_size
    geometry = replace(
        read_geometry(config),
        kv_heads=tuple(heads // kinds["attention"]["n_heads_in_group"] for kinds in blocks),
        channels=tuple(_read_width(kinds["ffn"]["ffn_mult"], width) for kinds in blocks),
    )
    write_geometry(config, geometry)
    return config


def _read_width(ffn_mult: float, hidden_size: int) -> int:
    return ceil(int(2 * ffn_mult * hidden_size / 3) / _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
