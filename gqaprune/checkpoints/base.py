"""What an export format is: the function that writes it, what it can hold, and what reads it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gqaprune.models.architecture import read_geometry
from gqaprune.plan import Geometry


@dataclass(frozen=True)
class Content:
    """What a format writes.

    Args:
        model: the pruned (or dense) model, whose config has the shapes.
        state_dict: its whole weights.
        tokenizer: of the model, if there is one.
        max_shard_size: weights above it are split into several files, such as `5GB`.
    """

    model: PreTrainedModel
    state_dict: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase | None
    max_shard_size: str


def show_loading(arguments: str = "") -> str:
    """The code block of a model card that loads a checkpoint with plain transformers.

    Args:
        arguments: further ones of `from_pretrained`, from their comma on.
    """
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({{folder_string}}{arguments})\n"
        "```"
    )


def accept_any(config: PretrainedConfig) -> None:
    """Refuse nothing."""


def say_nothing(folder: Path) -> str:
    """Remark on nothing."""
    return ""


@dataclass(frozen=True)
class Format:
    """An export format; `formats.FORMATS` names every one.

    Args:
        write: writes content into a new folder.
        summary: what it is, in a few words, for help texts.
        about: the same in a sentence, for the model card.
        loading: code block of the model card that loads it. In Python `{folder_string}` and `{file_string}` stand for
            the names, quotes included, and in a command `{folder_word}` and `{file_word}` for the paths.
        serving: command of the model card that serves it by vLLM, with `{folder_word}`; empty where it cannot.
        check: refuses a model of this config that the format cannot hold, by a ValueError that names what can.
        read_shapes: finds the shapes in the files of a model of this config; padding makes them larger than its own.
        describe: what is worth a remark in the files of a folder, in a sentence; empty if nothing.
        file: pattern of the one file that holds config, weights and tokenizer; empty for a folder of several files.
        is_automatic: whether `auto` may choose it: `auto` is the first such format that can hold the model.
        only_unequal: whether it is for models whose layers differ alone; others are written as `stock`.
        needs_equal_counts: whether every layer has to keep as many units as all others.
        needs_remote_code: whether plain transformers loads it with `trust_remote_code=True` alone.
        goes_by_layer: whether it can be written where one decoder layer is in memory at a time.
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
