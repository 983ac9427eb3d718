"""Models whose decoder layers differ in shape: the class to load them with, and its source to put beside the weights.

transformers keeps per-layer shapes in a config (`per_layer_config`) but its models build every layer from the global
values. `PerLayerShapes` builds each layer from its own values; checkpoints carry its source, so that plain
transformers loads them with `trust_remote_code=True` where gqaprune is not installed.
"""

import inspect
from typing import Any, cast

from transformers import PretrainedConfig, PreTrainedModel

MODELING_FILE = "modeling_pruned.py"


class PerLayerShapes:
    """Rebuilds every decoder layer from its own entry of `config.per_layer_config`."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        decoder = cast(Any, self).model
        for index, layer in enumerate(decoder.layers):
            rebuilt = type(layer)(config.per_layer_config[index], index)
            for module in rebuilt.modules():
                if hasattr(module, "config"):  # later changes of the model's config (attention) must reach the layer
                    module.config = config
            decoder.layers[index] = rebuilt
        cast(Any, self).post_init()


def get_per_layer_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class that loads a per-layer checkpoint of a stock class, without remote code."""
    return type(_class_name(base), (PerLayerShapes, base), {"__module__": base.__module__})


def write_modeling_source(base: type[PreTrainedModel]) -> str:
    """Source of the modeling file: `PerLayerShapes` and the class of one family, on plain transformers."""
    name = _class_name(base)
    return (
        f'"""{base.__name__} with its own shapes in every layer. Written by gqaprune."""\n\n'
        "from typing import Any, cast\n\n"
        f"from transformers import {base.__name__}\n\n\n"
        f"{inspect.getsource(PerLayerShapes)}\n\n"
        f"class {name}(PerLayerShapes, {base.__name__}):\n"
        f'    """{base.__name__} built layer by layer from `config.per_layer_config`."""\n'
    )


def point_to_modeling_file(config: PretrainedConfig, base: type[PreTrainedModel]) -> None:
    """Make `AutoModelForCausalLM` find the modeling file."""
    config.architectures = [_class_name(base)]
    config.auto_map = {"AutoModelForCausalLM": f"{MODELING_FILE.removesuffix('.py')}.{_class_name(base)}"}


def _class_name(base: type[PreTrainedModel]) -> str:
    return f"PerLayer{base.__name__}"
