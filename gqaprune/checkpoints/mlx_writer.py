"""Write a model as a folder for mlx-lm: a stock or per-layer checkpoint, and the modeling file for mlx-lm.

`model_file` in the config names that file. It also reads the rotary embedding where transformers writes it, unlike
mlx-lm's own Llama.
"""

import json
from importlib.resources import files
from pathlib import Path

from jinja2 import Template
from transformers import PretrainedConfig
from transformers.utils import CONFIG_NAME

from gqaprune.checkpoints.base import Content
from gqaprune.checkpoints.safetensors_writer import write_per_layer, write_stock
from gqaprune.models.architecture import find_oddity, make_stock_config

MLX_FILE = "modeling_mlx.py"

_MODULES = {"llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "qwen3"}
"""`model_type` -> module of mlx-lm whose layers can have their own sizes and biases."""


def write_mlx(content: Content, folder: Path) -> None:
    """Write a checkpoint of a stock class if it can store the shapes, else per layer, with the modeling file."""
    config = content.model.config
    write = write_per_layer if make_stock_config(config) is None else write_stock
    write(content, folder)
    template = files("gqaprune.checkpoints").joinpath(f"templates/{MLX_FILE}.jinja").read_text(encoding="utf-8")
    source = Template(template, keep_trailing_newline=True).render(module=_MODULES[config.model_type])
    (folder / MLX_FILE).write_text(source, encoding="utf-8")
    settings = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")) | {"model_file": MLX_FILE}
    (folder / CONFIG_NAME).write_text(f"{json.dumps(settings, indent=2, sort_keys=True)}\n", encoding="utf-8")


def check_can_be_mlx(config: PretrainedConfig) -> None:
    """Raise an error if mlx-lm would misread the model.

    Raises:
        ValueError: with the part that it cannot read.
    """
    if config.model_type not in _MODULES:
        raise ValueError(
            f"format mlx supports {', '.join(_MODULES)} models, got {config.model_type!r}; use per-layer or padded"
        )
    has_biases = config.model_type == "qwen3" and config.attention_bias
    if oddity := find_oddity(config) or ("its biases" if has_biases else ""):
        raise ValueError(f"format mlx cannot store {oddity}; use per-layer or padded")
