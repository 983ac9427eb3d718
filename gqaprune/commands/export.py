"""`gqaprune export`: write a pruned or dense model in another format."""

from pathlib import Path

from gqaprune.checkpoints.card import describe_padding
from gqaprune.checkpoints.formats import AUTO, FORMATS, choose_format
from gqaprune.checkpoints.save import SHARD_SIZE, measure_weights, save
from gqaprune.common.console import console
from gqaprune.models.architecture import find_blocks, read_geometry
from gqaprune.models.loading import load_model
from gqaprune.models.sources import pin
from gqaprune.models.tokenizer import load_tokenizer
from gqaprune.plan import find_plan
from gqaprune.scoring.scores import check_finite_weights


def export(
    model: str,
    folder: str,
    format: str = AUTO,
    max_shard_size: str = SHARD_SIZE,
    quantization: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> None:
    """Write a model in another format: pruned or dense, a folder, a GGUF file or a hub name.

    Args:
        model: model to write: a folder, a `.gguf` file, a hub name, or `smollm2-135m`.
        folder: new or empty folder to write to.
        format: one of `checkpoints.formats.FORMATS`, or `auto`: `stock` if all layers have equal counts, else
            `per-layer`.
        max_shard_size: largest size of a weights file, such as `5GB`; larger checkpoints are divided into several
            files.
        quantization: `int8` stores the matrices of the decoder layers in 8 bits, with torchao.
        dtype: type of the weights: `float32`, `bfloat16`, `float16`, or `auto` (the type in the checkpoint).
        trust_remote_code: run code that comes with the model. gqaprune loads pruned checkpoints without it.
        revision: branch, tag or commit of a model on the hub.

    Raises:
        ValueError: if the model does not exist, its weights are not finite in `dtype`, or the format cannot store it.
    """
    model = pin(model, revision)
    loaded = load_model(model, dtype, trust_remote_code=trust_remote_code)
    entry = FORMATS[choose_format(loaded.config, format, quantization)]
    find_blocks(loaded)  # raises an error for quantised weights
    check_finite_weights(loaded)
    plan = find_plan(model, read_geometry(loaded.config))
    written = save(
        loaded,
        load_tokenizer(model, trust_remote_code),
        folder,
        plan,
        format=format,
        max_shard_size=max_shard_size,
        quantization=quantization,
    )
    size = measure_weights(Path(folder))
    console.print(f"{folder}  {written} format, {size / 1e6:,.1f} MB of weights")
    dense = None if plan is None else plan.geometry
    if padding := describe_padding(read_geometry(loaded.config), entry.read_shapes(loaded.config), dense):
        console.print(padding)
    if remark := entry.describe(Path(folder)):
        console.print(remark)
