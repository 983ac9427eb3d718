"""Model families as data, by which `architecture.py` reads models.

A family describes where its decoder layers are, which projections feed a block, which parts are stacked in the rows of
each, and which projection the block's units write to. A fused projection (Phi-3's `qkv_proj`) is one entry with
several parts.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PretrainedConfig

from gqaprune.plan import BlockKind


@dataclass(frozen=True)
class BlockLayout:
    """Where a block's weights are.

    Args:
        module: the block's attribute in the decoder layer.
        inputs: projection -> parts stacked in its rows, each one of `query` (always first), `key`, `value`, `gate`,
            `up`.
        output: projection whose columns write the units to the residual stream.
    """

    module: str
    inputs: Mapping[str, tuple[str, ...]]
    output: str


@dataclass(frozen=True)
class Family:
    """One model family: path of its decoder layers and the layout of their blocks.

    Args:
        layers: path of the decoder layers in the model.
        attention: layout of the attention blocks.
        mlp: layout of the MLPs, or of the shared ones beside experts; None if there are only experts.
        width: setting of the config with the number of channels of these MLPs.
        has_experts: whether every layer is a mixture of experts, which are not pruned.
        biases: kind of block -> flag of the config that adds biases to all its projections, the output's included.
        whole: kind of block -> why its units cannot be removed.
        output_norms: kind of block -> norm of the decoder layer between its output and the residual stream, if there
            is one.
        scaled: kinds of block whose output is scaled for each token before the residual stream.
        begins_with_bos: whether every window begins with the beginning-of-text token, without which the model fails;
            else only the beginning of a text has it, if the tokenizer adds it, as in the usual protocol of WikiText-2.
    """

    layers: str
    attention: BlockLayout
    mlp: BlockLayout | None
    width: str = "intermediate_size"
    has_experts: bool = False
    biases: Mapping[BlockKind, str] = field(default_factory=dict)
    whole: Mapping[BlockKind, str] = field(default_factory=dict)
    output_norms: Mapping[BlockKind, str] = field(default_factory=dict)
    scaled: frozenset[BlockKind] = frozenset()
    begins_with_bos: bool = False

    @property
    def layouts(self) -> dict[BlockKind, BlockLayout]:
        """Kind of block -> its layout, for the kinds that the family has."""
        layouts: dict[BlockKind, BlockLayout | None] = {"attention": self.attention, "mlp": self.mlp}
        return {kind: layout for kind, layout in layouts.items() if layout is not None}


_MLP = BlockLayout(module="mlp", inputs={"gate_proj": ("gate",), "up_proj": ("up",)}, output="down_proj")
_LLAMA = Family(
    layers="model.layers",
    attention=BlockLayout(
        module="self_attn",
        inputs={"q_proj": ("query",), "k_proj": ("key",), "v_proj": ("value",)},
        output="o_proj",
    ),
    mlp=_MLP,
)

_WITH_BIASES = dataclasses.replace(_LLAMA, biases={"attention": "attention_bias", "mlp": "mlp_bias"})
_WITH_ATTENTION_BIAS = dataclasses.replace(_LLAMA, biases={"attention": "attention_bias"})
_OUTPUT_NORMS: Mapping[BlockKind, str] = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
_OLMO = dataclasses.replace(
    _WITH_ATTENTION_BIAS,
    whole={"attention": "one norm spans all its query heads, so removing some would change the others"},
    output_norms=_OUTPUT_NORMS,
)
_GEMMA = dataclasses.replace(_WITH_ATTENTION_BIAS, output_norms=_OUTPUT_NORMS, begins_with_bos=True)
_EXPERTS = dataclasses.replace(
    _LLAMA, mlp=None, has_experts=True, whole={"mlp": "its MLPs are experts, which are not pruned"}
)

FAMILIES: Mapping[str, Family] = {
    "exaone4": dataclasses.replace(_LLAMA, output_norms=_OUTPUT_NORMS),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "granite": _WITH_BIASES,
    "llama": _WITH_BIASES,
    "mistral": _LLAMA,
    "mixtral": _EXPERTS,
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "phi3": Family(
        layers="model.layers",
        attention=BlockLayout("self_attn", {"qkv_proj": ("query", "key", "value")}, "o_proj"),
        mlp=BlockLayout("mlp", {"gate_up_proj": ("gate", "up")}, "down_proj"),
    ),
    "qwen2": _LLAMA,
    "qwen2_moe": dataclasses.replace(
        _LLAMA,
        mlp=dataclasses.replace(_MLP, module="mlp.shared_expert"),
        width="shared_expert_intermediate_size",
        has_experts=True,
        scaled=frozenset({"mlp"}),
    ),
    "qwen3": _WITH_ATTENTION_BIAS,
    "qwen3_moe": dataclasses.replace(_EXPERTS, biases={"attention": "attention_bias"}),
    "smollm3": _WITH_BIASES,
}
"""Supported `model_type`s."""
_ALIKE: Mapping[str, Family] = dict.fromkeys(
    ("gemma", "gemma3", "vaultgemma"), dataclasses.replace(_LLAMA, begins_with_bos=True)
)
"""Families that are Llamas in all but name, with their differences; `gemma3` is the name of `gemma3_text` in GGUF."""
_LLAMA_SETTINGS = {
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
}
"""Settings in the config of a Llama in all but name."""


def get_family(config: PretrainedConfig) -> Family:
    """Find the family of a model; an unknown dense model with Llama's settings counts as a Llama.

    `surgery.compatibility.check_compatibility` checks its layers.

    Raises:
        ValueError: if the family is not supported, with the supported ones.
    """
    family = FAMILIES.get(config.model_type)
    if family is not None:
        dense_layers = getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1
        if family.has_experts and dense_layers:
            raise ValueError(
                f"this {config.model_type} has layers with experts and layers without, which cannot be pruned yet"
            )
        return family
    settings = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    if settings.keys() >= _LLAMA_SETTINGS and not any("expert" in name and settings[name] for name in settings):
        return _ALIKE.get(config.model_type, _LLAMA)
    raise ValueError(
        f"models of type {config.model_type!r} cannot be pruned yet; supported types: {', '.join(sorted(FAMILIES))}"
    )


def begins_with_bos(model_type: str) -> bool:
    """Return whether windows of a model of this type, or GGUF architecture, begin with BOS."""
    return FAMILIES.get(model_type, _ALIKE.get(model_type, _LLAMA)).begins_with_bos
