"""Models whose decoder layers differ in shape: the class to load them with, and its source to put beside the weights.

transformers keeps per-layer shapes in a config (`per_layer_config`) but its models build every layer from the global
values. `PerLayerShapes` builds each layer from its own values; checkpoints carry its source, so that plain
transformers loads them with `trust_remote_code=True` where gqaprune is not installed.
"""

import inspect
from typing import Any, cast

from transformers import PretrainedConfig, PreTrainedModel

MODELING_FILE = "modeling_pruned.py"


class LayerConfig:
    """A layer's own shapes; all else, later changes included (attention), is the model's config's."""

    def __init__(self, config: Any, own: dict[str, Any]) -> None:
        self.__dict__.update(own, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and "_config" not in self.__dict__:  # asked for while it is copied
            raise AttributeError(name)
        return getattr(self._config, name)


class PerLayerShapes:
    """Rebuilds every decoder layer from its own entry of `config.per_layer_config`."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        decoder = cast(Any, self).model
        for index, layer in enumerate(decoder.layers):
            own = config.per_layer_config[index]
            rebuilt = type(layer)(own, index)
            for module in rebuilt.modules():
                if hasattr(module, "config"):
                    module.config = LayerConfig(
                        config, {name: getattr(own, name) for name in config.per_layer_attributes}
                    )
            decoder.layers[index] = rebuilt
        cast(Any, self).post_init()


def get_per_layer_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class that loads a per-layer checkpoint of a stock class, without remote code."""
    return type(_class_name(base), (PerLayerShapes, base), {"__module__": base.__module__})


def write_modeling_source(base: type[PreTrainedModel]) -> str:
    """Source of the modeling file: `LayerConfig`, `PerLayerShapes` and the class of a family, on plain transformers."""
    name = _class_name(base)
    return (
        f'"""{base.__name__} with its own shapes in every layer. Written by gqaprune."""\n\n'
        "from typing import Any, cast\n\n"
        f"from transformers import {base.__name__}\n\n\n"
        f"{inspect.getsource(LayerConfig)}\n\n"
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
