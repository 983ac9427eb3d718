"""Model families as data, for `architecture.py` to read models by.

A family says where its decoder layers are, which projections feed a block, which parts are stacked in the rows of each,
and through which projection the block's units leave. A fused projection (Phi-3's `qkv_proj`) is one entry with several
parts.
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
        output: projection whose columns carry the units into the residual stream.
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
        mlp: layout of the MLPs, or of the shared ones beside experts; none where there are experts alone.
        width: setting of the config that says how many channels these have.
        has_experts: whether every layer is a mixture of experts, which are left alone.
        biases: kind of block -> flag of the config that gives all its projections biases, the output's among them.
        whole: kind of block -> why its units cannot be removed.
        output_norms: kind of block -> norm of the decoder layer that its output passes on the way to the residual
            stream, where there is one.
        scaled: kinds of block whose output every token scales by itself on that way.
        begins_with_bos: whether every window begins with the beginning-of-text token, without which the model is out of
            its senses; else only a text's own beginning has it, where the tokenizer adds it, as the usual protocol of
            WikiText-2 has it.
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
        """The layout of each kind of block that there is."""
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
    whole={"attention": "one norm spans all its query heads, so that those that stay would change with the others"},
    output_norms=_OUTPUT_NORMS,
)
_GEMMA = dataclasses.replace(_WITH_ATTENTION_BIAS, output_norms=_OUTPUT_NORMS, begins_with_bos=True)
_EXPERTS = dataclasses.replace(
    _LLAMA, mlp=None, has_experts=True, whole={"mlp": "its MLPs are experts, which are left alone"}
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
"""What families of Llamas in all but name say besides; `gemma3` is what GGUF files call `gemma3_text`."""
_LLAMA_SETTINGS = {
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
}
"""What the config of a Llama in all but name has."""


def get_family(config: PretrainedConfig) -> Family:
    """Find the family of a model; a dense one that is not known, but has Llama's settings, is taken for a Llama.

    `surgery.compatibility.check_compatibility` looks at its layers.

    Raises:
        ValueError: if the family is not supported, with those that are.
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
    """Whether windows of a model of this type, or GGUF architecture, begin with BOS."""
    return FAMILIES.get(model_type, _ALIKE.get(model_type, _LLAMA)).begins_with_bos
