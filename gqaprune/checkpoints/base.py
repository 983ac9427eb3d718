"""Description of an export format: the function that writes it, the models it can store, and how to load it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gqaprune.geometry import Geometry
from gqaprune.models.architecture import read_geometry


@dataclass(frozen=True)
class Content:
    """A model to write.

    Args:
        model: the pruned (or dense) model, whose config has the shapes.
        state_dict: its whole weights.
        tokenizer: tokenizer of the model, if there is one.
        max_shard_size: largest size of a weights file, such as `5GB`.
    """

    model: PreTrainedModel
    state_dict: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase | None
    max_shard_size: str


def show_loading(arguments: str = "") -> str:
    """Return a model card's code block that loads a checkpoint with plain transformers.

    Args:
        arguments: further arguments of `from_pretrained`, beginning with a comma.
    """
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({{folder_string}}{arguments})\n"
        "```"
    )


def accept_any(config: PretrainedConfig) -> None:
    """Accept every config."""


def say_nothing(folder: Path) -> str:
    """Return no remark."""
    return ""


@dataclass(frozen=True)
class Format:
    """An export format; `formats.FORMATS` names every one.

    Args:
        write: writes content into a new folder.
        summary: short description for help texts.
        about: description in a sentence, for the model card.
        loading: code block of the model card that loads it. In Python, `{folder_string}` and `{file_string}` are
            replaced by the names, quotes included; in a command, `{folder_word}` and `{file_word}` by the paths.
        serving: command of the model card that serves it with vLLM, with `{folder_word}`; empty if vLLM cannot.
        check: raises a ValueError, which names formats that work, if the format cannot store a model of this config.
        read_shapes: finds the shapes in the files of a model of this config; padding makes them larger than the
            model's.
        describe: returns a sentence about the files in a folder that is worth printing; empty if there is none.
        file: pattern of the one file with config, weights and tokenizer; empty for a folder of several files.
        is_automatic: whether `auto` may choose it: `auto` is the first such format that can store the model.
        only_unequal: whether it is only for models whose layers differ; others are written as `stock`.
        needs_equal_counts: whether every layer must keep the same number of units.
        needs_remote_code: whether plain transformers loads it only with `trust_remote_code=True`.
        goes_by_layer: whether it can be written with one decoder layer in memory at a time.
        takes_quantization: whether the matrices of its decoder layers can be stored in 8 bits.
    """

    write: Callable[[Content, Path], None]
    summary: str
    about: str
    loading: str = show_loading()
    serving: str = ""
    check: Callable[[PretrainedConfig], object] = accept_any
    read_shapes: Callable[[PretrainedConfig], Geometry] = read_geometry
    describe: Callable[[Path], str] = say_nothing
    file: str = ""
    is_automatic: bool = False
    only_unequal: bool = False
    needs_equal_counts: bool = False
    needs_remote_code: bool = False
    goes_by_layer: bool = False
    takes_quantization: bool = True
