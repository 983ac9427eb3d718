"""The class that loads models whose decoder layers differ in shape, and its source for checkpoints.

transformers keeps per-layer shapes in a config (`per_layer_config`) but builds every layer from the global values.
`PerLayerShapes` builds each layer from its own values. Its source is saved beside the weights, so that plain
transformers, and vLLM with it, load them with `trust_remote_code=True` without gqaprune.
"""

import inspect
import sys
from typing import Any, cast

from transformers import MODEL_MAPPING, PretrainedConfig, PreTrainedModel

MODELING_FILE = "modeling_pruned.py"


class LayerConfig:
    """A layer's shapes; all other settings are the model's, also if they change later (attention)."""

    def __init__(self, config: Any, own: dict[str, Any]) -> None:
        self.__dict__.update(own, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and "_config" not in self.__dict__:  # while it is copied
            raise AttributeError(name)
        return getattr(self._config, name)


class PerLayerShapes:
    """Builds every decoder layer from its own entry of `config.per_layer_config`."""

    layer_class: type

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        count = config.num_hidden_layers
        config.num_hidden_layers = 0  # so that the stock class builds no layers from the global values
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
        """Return False: weights, also those of experts, are stored like those of the stock class."""
        return False


def get_per_layer_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Make the class that loads a per-layer checkpoint of a stock class, without remote code."""
    members = {"__module__": base.__module__, "layer_class": getattr(sys.modules[base.__module__], _name_layer(base))}
    return type(_name_class(base), (PerLayerShapes, base), members)


def write_modeling_source(config: PretrainedConfig, base: type[PreTrainedModel]) -> str:
    """Write the source of the modeling file: `PerLayerShapes` and the classes of a family, for plain transformers.

    Args:
        config: config of the model.
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
    """Make `AutoModelForCausalLM`, and `AutoModel` for vLLM, find the modeling file."""
    # With the name of a class that vLLM has itself, vLLM would build every layer from the global values.
    config.architectures = [_name_class(base)]
    places = {"AutoModel": MODEL_MAPPING[type(config)], "AutoModelForCausalLM": base}
    module = MODELING_FILE.removesuffix(".py")
    config.auto_map = {auto: f"{module}.{_name_class(each)}" for auto, each in places.items()}
    if scaling := getattr(config, "logits_scaling", None):
        config.logit_scale = 1 / scaling  # vLLM multiplies logits by it, whatever its name in the family


def _name_class(base: type[PreTrainedModel]) -> str:
    return f"PerLayer{base.__name__}"


def _name_layer(base: type[PreTrainedModel]) -> str:
    """Return the name of the class of decoder layers, in the module of a model's class."""
    name, *_ = cast(Any, base)._no_split_modules
    return str(name)
