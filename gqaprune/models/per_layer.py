"""Models whose decoder layers differ in shape: the class to load them with, and its source to put beside the weights.

transformers keeps per-layer shapes in a config (`per_layer_config`) but its models build every layer from the global
values. `PerLayerShapes` builds each layer from its own values; checkpoints carry its source, so that plain
transformers, and vLLM on top of it, load them with `trust_remote_code=True` where gqaprune is not installed.
"""

import inspect
import sys
from typing import Any, cast

from transformers import MODEL_MAPPING, PretrainedConfig, PreTrainedModel

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
    """Builds every decoder layer from its own entry of `config.per_layer_config`."""

    layer_class: type

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        count = config.num_hidden_layers
        config.num_hidden_layers = 0  # which keeps the stock class from building layers of the global values
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            config.num_hidden_layers = count
        layers = cast(Any, self).base_model.layers
        for index in range(count):
            shapes = config.per_layer_config[index]
            own = {name: getattr(shapes, name) for name in config.per_layer_attributes}
            layers.append(self.layer_class(LayerConfig(config, own), index))
        cast(Any, self).post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """Not to transformers: weights, those of experts too, are stored as the stock class stores them."""
        return False


def get_per_layer_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class that loads a per-layer checkpoint of a stock class, without remote code."""
    members = {"__module__": base.__module__, "layer_class": getattr(sys.modules[base.__module__], _name_layer(base))}
    return type(_name_class(base), (PerLayerShapes, base), members)


def write_modeling_source(config: PretrainedConfig, base: type[PreTrainedModel]) -> str:
    """Source of the modeling file: `PerLayerShapes` and the classes of a family, on plain transformers.

    Args:
        config: of the model.
        base: its stock class.
    """
    layer, classes = _name_layer(base), (MODEL_MAPPING[type(config)], base)
    bases = ", ".join(sorted((layer, *(each.__name__ for each in classes))))
    return (
        f'"""{base.__name__} with its own shapes in every layer. Written by gqaprune."""\n\n'
        "from typing import Any, cast\n\n"
        f"from {base.__module__} import {bases}\n\n\n"
        f"{inspect.getsource(LayerConfig)}\n\n"
        f"{inspect.getsource(PerLayerShapes)}"
    ) + "".join(
        f"\n\nclass {_name_class(each)}(PerLayerShapes, {each.__name__}):\n"
        f'    """{each.__name__} built layer by layer from `config.per_layer_config`."""\n\n'
        f"    layer_class = {layer}\n"
        for each in classes
    )


def point_to_modeling_file(config: PretrainedConfig, base: type[PreTrainedModel]) -> None:
    """Make `AutoModelForCausalLM` find the modeling file, and `AutoModel`, which vLLM builds models by."""
    # A name that vLLM has a class of its own for would make it build every layer from the global values.
    config.architectures = [_name_class(base)]
    places = {"AutoModel": MODEL_MAPPING[type(config)], "AutoModelForCausalLM": base}
    module = MODELING_FILE.removesuffix(".py")
    config.auto_map = {auto: f"{module}.{_name_class(each)}" for auto, each in places.items()}
    if scaling := getattr(config, "logits_scaling", None):
        config.logit_scale = 1 / scaling  # which vLLM multiplies logits by, whatever the family calls it


def _name_class(base: type[PreTrainedModel]) -> str:
    return f"PerLayer{base.__name__}"


def _name_layer(base: type[PreTrainedModel]) -> str:
    """Name of the class of decoder layers, in the module of a model's class."""
    name, *_ = cast(Any, base)._no_split_modules
    return str(name)
