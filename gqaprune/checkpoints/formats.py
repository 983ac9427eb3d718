"""List the export formats by name, and choose the one that a model is written in."""

from collections.abc import Mapping
from functools import partial

from transformers import PretrainedConfig

from gqaprune.checkpoints.base import Format, show_loading
from gqaprune.checkpoints.gguf_quantizer import (
    MIXTURES,
    check_quantizable,
    describe_fallbacks,
    find_quantized_shapes,
    write_quantized_checkpoint,
)
from gqaprune.checkpoints.gguf_writer import TYPES, choose_architecture, find_gguf_shapes, write_gguf_checkpoint
from gqaprune.checkpoints.mlx_writer import check_can_be_mlx, write_mlx
from gqaprune.checkpoints.padding import find_padded_shapes
from gqaprune.checkpoints.safetensors_writer import (
    check_class,
    check_stock_config,
    write_nemotron_nas,
    write_padded,
    write_per_layer,
    write_stock,
)
from gqaprune.common.sentences import describe_choices, join_choices
from gqaprune.models.loading import make_quantization_config
from gqaprune.models.nemotron_nas import check_can_be_nemotron_nas, find_nemotron_nas_shapes
from gqaprune.placement.layer_store import Placement

AUTO = "auto"
"""The name for the first automatic format that can store the model."""

_SERVING = "vllm serve {folder_word}"

_GGUF_LOADING = """\
```bash
llama-cli -m {file_word}
llama-server -m {file_word}
```

```python
import gqaprune

model, tokenizer = gqaprune.load({folder_string})
```"""

FORMATS: Mapping[str, Format] = {
    "stock": Format(
        write_stock,
        summary="loads with plain transformers; needs equal counts in every layer",
        about="A stock checkpoint: plain transformers loads it.",
        serving=_SERVING,
        check=check_stock_config,
        is_automatic=True,
        needs_equal_counts=True,
        goes_by_layer=True,
    ),
    "per-layer": Format(
        write_per_layer,
        summary="unequal counts, with a small modeling file",
        about="Layers differ in shape, so plain transformers needs the small modeling file beside the weights.",
        loading=show_loading(", trust_remote_code=True"),
        serving=f"{_SERVING} --trust-remote-code",
        check=check_class,
        is_automatic=True,
        only_unequal=True,
        needs_remote_code=True,
        goes_by_layer=True,
    ),
    "padded": Format(
        write_padded,
        summary="a stock class, with smaller layers padded with zeros",
        about="A stock checkpoint, in which layers are padded with zeros to equal shapes.",
        serving=_SERVING,
        read_shapes=find_padded_shapes,
        is_automatic=True,
    ),
    "nemotron-nas": Format(
        write_nemotron_nas,
        summary="for vLLM, SGLang and mlx-lm, with each MLP padded to a multiple of 256 channels; attention unpruned",
        about="A Nemotron-NAS (DeciLM) checkpoint: engines with this architecture give each layer its own width.",
        loading=(
            "```bash\n"
            'mlx_lm.generate --model {folder_word} --trust-remote-code --prompt "Once upon a time"\n'
            "```\n\n"
            "mlx-lm and vLLM have the model built in; the remote code is only the class of its config. transformers "
            "has no class for the model; gqaprune loads it as a Llama:\n\n"
            "```python\n"
            "model, tokenizer = gqaprune.load({folder_string})\n"
            "```"
        ),
        serving=f"{_SERVING} --trust-remote-code",
        check=check_can_be_nemotron_nas,
        read_shapes=find_nemotron_nas_shapes,
        takes_quantization=False,
    ),
    "mlx": Format(
        write_mlx,
        summary="any counts, with a modeling file for mlx-lm",
        about="A checkpoint for mlx-lm, which builds each layer at its own size with the modeling file beside it.",
        loading=(
            "```bash\n"
            'mlx_lm.generate --model {folder_word} --trust-remote-code --prompt "Once upon a time"\n'
            "```\n\n"
            "transformers loads it as well, with `trust_remote_code=True`."
        ),
        check=check_can_be_mlx,
        needs_remote_code=True,
        takes_quantization=False,
    ),
    **{
        f"gguf-{kind}": Format(
            partial(write_gguf_checkpoint, kind=kind),
            summary=f"a file for llama.cpp, matrices in {kind}, each layer at its own size",
            about="A GGUF file for llama.cpp and programs based on it. transformers cannot read its unequal layers.",
            loading=_GGUF_LOADING,
            check=choose_architecture,
            read_shapes=partial(find_gguf_shapes, kind=kind),
            file="*.gguf",
            takes_quantization=False,
        )
        for kind in TYPES
    },
    **{
        f"gguf-{kind}-padded": Format(
            partial(write_gguf_checkpoint, kind=kind, is_padded=True),
            summary=f"the same with padded layers, matrices in {kind}; loads with plain transformers",
            about="A GGUF file for llama.cpp and for transformers, with layers padded with zeros to equal shapes.",
            loading=show_loading(", gguf_file={file_string}"),
            check=partial(choose_architecture, is_padded=True),
            read_shapes=partial(find_gguf_shapes, kind=kind, is_padded=True),
            file="*.gguf",
            takes_quantization=False,
        )
        for kind in TYPES
    },
    **{
        f"gguf-{kind}": Format(
            partial(write_quantized_checkpoint, kind=kind),
            summary=f"a file for llama.cpp in {bits} bits, from its own quantiser",
            about=f"A GGUF file in the mixture {kind.upper()} of llama.cpp's quantiser, for llama.cpp-based programs.",
            loading=_GGUF_LOADING,
            check=check_quantizable,
            read_shapes=find_quantized_shapes,
            describe=describe_fallbacks,
            file="*.gguf",
            takes_quantization=False,
        )
        for kind, bits in zip(MIXTURES, (4, 5, 6), strict=True)
    },
}
"""Name -> format."""


def describe_formats() -> str:
    """Describe the values of the setting `format`, for help texts."""
    automatic = join_choices([f"`{name}`" for name, entry in FORMATS.items() if entry.is_automatic])
    choices = describe_choices({name: entry.summary for name, entry in FORMATS.items()})
    return f"{choices}; `{AUTO}` is the first of {automatic} that can store the model."


def choose_format(
    config: PretrainedConfig,
    format: str,
    quantization: str | None = None,
    placement: Placement = Placement.MEMORY,
) -> str:
    """Choose the format that a model of this config is written in.

    Args:
        config: config of the model.
        format: one of `FORMATS`, or `auto`.
        quantization: quantization of the weights.
        placement: where the model's decoder layers are when it is written.

    Raises:
        ValueError: if the format does not exist or cannot store the model, or not with this quantisation; or if `auto`
            chooses one that needs the whole model in memory, and it is elsewhere.
    """
    if quantization is not None:
        make_quantization_config(quantization)
    if format == AUTO:
        name = next(name for name, entry in FORMATS.items() if entry.is_automatic and _can_hold(entry, config))
        if not FORMATS[name].goes_by_layer:
            check_unequal_by_layer(config, placement)
        return name
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join((AUTO, *FORMATS))}, got {format!r}")
    entry = FORMATS[format]
    if quantization is not None and not entry.takes_quantization:
        raise ValueError(f"format {format} cannot be combined with quantization {quantization}: set only one of them")
    if entry.only_unequal and not config.is_heterogeneous:
        return "stock"  # with equal layers, it would only add a modeling file
    entry.check(config)
    return format


def check_unequal_by_layer(config: PretrainedConfig, placement: Placement) -> None:
    """Raise an error if layers of unequal counts would be written layer by layer in a format that cannot be.

    Raises:
        ValueError: with settings that work.
    """
    if placement is not Placement.MEMORY and not _can_hold(FORMATS["per-layer"], config):
        raise ValueError(
            f"{type(config).__name__} comes with its own code: only format padded can store its layers of unequal "
            f"counts, and that needs the whole model in memory, but pruning.{placement.value} keeps layers out of it; "
            f"set pruning.allocation to uniform or pruning.{placement.value} to false"
        )


def _can_hold(entry: Format, config: PretrainedConfig) -> bool:
    try:
        entry.check(config)
    except ValueError:
        return False
    return True


def needs_equal_counts(format: str) -> bool:
    """Return whether a format, by its name, needs equal counts in every layer; `auto` does not."""
    return format != AUTO and FORMATS[format].needs_equal_counts


def check_written_by_layer(format: str, quantization: str | None, placement: Placement) -> None:
    """Raise an error if a format or quantization needs the whole model in memory and its layers are elsewhere.

    Raises:
        ValueError: with formats that work, and a later command that writes the requested one.
    """
    if placement is Placement.MEMORY:
        return
    by_layer = [AUTO, *(name for name, entry in FORMATS.items() if entry.goes_by_layer)]
    for name, value, way_out in (
        ("format", None if format in by_layer else format, join_choices(by_layer)),
        ("quantization", quantization, "null"),
    ):
        if value is not None:
            raise ValueError(
                f"{name} {value} needs the whole model in memory, but pruning.{placement.value} keeps layers out of "
                f"it: set {name} to {way_out}, and run gqaprune export --{name} {value} on a machine with enough memory"
            )
