"""Classes that build each decoder layer from its own shapes."""

import copy

import pytest
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from gqaprune.models.per_layer import get_per_layer_class, point_to_modeling_file

from cuts import UNEVEN, make_pruned


def test_layers_are_built_once_and_at_their_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    config, widths = make_pruned("llama", UNEVEN).config, []

    class Recorded(LlamaMLP):
        def __init__(self, config: object) -> None:
            widths.append(config.intermediate_size)  # type: ignore[attr-defined]
            super().__init__(config)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP", Recorded)
    get_per_layer_class(LlamaForCausalLM)._from_config(config)
    assert widths == [2, 20, 7]


def test_config_whose_model_cannot_be_built_keeps_its_number_of_layers() -> None:
    config = make_pruned("llama", UNEVEN).config
    config.vocab_size = -1
    with pytest.raises(AssertionError):
        get_per_layer_class(LlamaForCausalLM)(config)
    assert config.num_hidden_layers == 3


def test_config_names_what_vllm_looks_for() -> None:
    config = copy.deepcopy(make_pruned("granite", UNEVEN).config)
    point_to_modeling_file(config, LlamaForCausalLM)
    assert config.logit_scale == pytest.approx(1 / 1.5)
    assert config.allow_global_per_layer_attribute_access
    assert config.architectures == ["PerLayerLlamaForCausalLM"]
    assert sorted(config.auto_map) == ["AutoModel", "AutoModelForCausalLM"]
