"""The export formats, by name, and which of them a model is written in."""

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
"""The name that stands for the first automatic format that can hold the model."""

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
        summary="plain transformers loads it; needs equal counts in every layer",
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
        about="Layers differ in shape, so that plain transformers needs the small modeling file beside the weights.",
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
        summary="a stock class, zeros for what some layers lack",
        about="A stock checkpoint, in which zeros fill the layers up to equal shapes.",
        serving=_SERVING,
        read_shapes=find_padded_shapes,
        is_automatic=True,
    ),
    "nemotron-nas": Format(
        write_nemotron_nas,
        summary="for vLLM, SGLang and mlx-lm, each MLP padded to a multiple of 256 channels; attention whole",
        about="A Nemotron-NAS (DeciLM) checkpoint: engines that know this architecture give each layer its own width.",
        loading=(
            "```bash\n"
            'mlx_lm.generate --model {folder_word} --trust-remote-code --prompt "Once upon a time"\n'
            "```\n\n"
            "mlx-lm and vLLM have the model built in; the remote code is the class of its config alone. transformers "
            "has no class for the model; gqaprune reads it as a Llama:\n\n"
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
        about="A checkpoint for mlx-lm, which builds each layer at its own size by the small modeling file beside it.",
        loading=(
            "```bash\n"
            'mlx_lm.generate --model {folder_word} --trust-remote-code --prompt "Once upon a time"\n'
            "```\n\n"
            "transformers loads it, too, with `trust_remote_code=True`."
        ),
        check=check_can_be_mlx,
        needs_remote_code=True,
        takes_quantization=False,
    ),
    **{
        f"gguf-{kind}": Format(
            partial(write_gguf_checkpoint, kind=kind),
            summary=f"a file for llama.cpp, matrices in {kind}, each layer at its own size",
            about="A GGUF file for llama.cpp and what builds on it. transformers' own reader takes no unequal layers.",
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
            summary=f"the same with layers padded, which plain transformers loads, matrices in {kind}",
            about="A GGUF file for llama.cpp, and for transformers: zeros fill the layers up to equal shapes.",
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
            summary=f"the same in {bits} bits, by llama.cpp's quantiser",
            about=f"A GGUF file in the mixture {kind.upper()} of llama.cpp's quantiser, for it and what builds on it.",
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
    """What the setting `format` takes, for help texts."""
    automatic = join_choices([f"`{name}`" for name, entry in FORMATS.items() if entry.is_automatic])
    choices = describe_choices({name: entry.summary for name, entry in FORMATS.items()})
    return f"{choices}; `{AUTO}` is {automatic}, the first that can hold the model."


def choose_format(
    config: PretrainedConfig,
    format: str,
    quantization: str | None = None,
    placement: Placement = Placement.MEMORY,
) -> str:
    """Resolve the name of a format to the one that a model of this config is written in.

    Args:
        config: of the model.
        format: one of `FORMATS`, or `auto`.
        quantization: that the weights are to be stored in.
        placement: where the model's decoder layers are when it is written.

    Raises:
        ValueError: if there is no such format, it cannot hold the model, or not with this quantisation; or if `auto`
            comes to one that needs the whole model in memory.
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
        raise ValueError(f"{format} does not go with quantization {quantization}: set one of them")
    if entry.only_unequal and not config.is_heterogeneous:
        return "stock"  # which is what that would be, without a file of its own
    entry.check(config)
    return format


def check_unequal_by_layer(config: PretrainedConfig, placement: Placement) -> None:
    """Refuse layers of unequal counts that nothing can hold which is written layer by layer.

    Raises:
        ValueError: with what can be written.
    """
    if placement is not Placement.MEMORY and not _can_hold(FORMATS["per-layer"], config):
        raise ValueError(
            f"{type(config).__name__} comes with code of its own: padded alone holds layers of unequal counts, and it "
            f"needs the whole model in memory, which {placement.value} avoids; keep equal counts (allocation uniform) "
            f"or leave {placement.value} off"
        )


def _can_hold(entry: Format, config: PretrainedConfig) -> bool:
    try:
        entry.check(config)
    except ValueError:
        return False
    return True


def needs_equal_counts(format: str) -> bool:
    """Whether a format, by its name, needs equal counts in every layer; `auto` does not."""
    return format != AUTO and FORMATS[format].needs_equal_counts


def check_written_by_layer(format: str, quantization: str | None, placement: Placement) -> None:
    """Refuse what cannot be written layer by layer, where a model's decoder layers are not all in memory.

    Raises:
        ValueError: with what can, and how to get there from it.
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
                f"{name} {value} needs the whole model in memory, which {placement.value} avoids: set it to {way_out}, "
                f"and where there is memory for it, gqaprune export --{name} {value}"
            )
