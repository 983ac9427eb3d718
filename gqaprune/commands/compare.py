"""`gqaprune compare`: show several models side by side, in a table, as JSON, or in a figure."""

import json as json_format
from collections.abc import Sequence
from pathlib import Path

from gqaprune.commands.comparison import build_comparison_table, draw_comparison
from gqaprune.commands.measure import Measuring, measure_models
from gqaprune.commands.tasks import Tasks
from gqaprune.common.console import SafeConsole, console
from gqaprune.models.dtypes import check_dtype
from gqaprune.reporting.charts import save_figure


def compare(
    models: list[str],
    corpora: list[str] = ["embedded"],  # noqa: B006  (a literal default reads best in --help; never changed)
    eval_window: int = 2048,
    eval_stride: int | None = None,
    eval_tokens: int | None = None,
    bos: bool | None = None,
    speed: bool = True,
    prompt: int = 512,
    generated: int = 64,
    tasks: str | None = None,
    tasks_limit: int | None = None,
    tasks_folder: str | None = None,
    dtype: str = "auto",
    json: bool = False,
    png: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Show models side by side: sizes, perplexity, speed, memory, and tasks if any are named.

    All models read the same text. If tokenizers differ, compare bits per byte, not perplexities per token.

    Args:
        models: two or more models, dense or pruned: folders, `.gguf` files, hub names, also as `owner/name@revision`,
            or `smollm2-135m`; the others are compared with the first.
        corpora: corpora whose perplexity to measure, as `data.evaluation.test`; `[]` measures none.
        eval_window: tokens per window, at least 2.
        eval_stride: tokens between the starts of windows, 1 to `eval_window`; null means no overlap.
        eval_tokens: largest number of tokens of each corpus, from its beginning, at least 1, counted with the first
            model's tokenizer; the other models read the same text. Null reads the whole split.
        bos: begin every window, and every question of a task, with the beginning-of-text token, as `data.bos`; null
            follows each model's family.
        speed: measure tokens per second and peak memory.
        prompt: tokens of the prompt that speed and memory are measured with, at least 1.
        generated: tokens that are generated after the prompt, one by one, at least 1.
        tasks: tasks of lm-evaluation-harness, such as `arc_easy,hellaswag`; needs the extra `eval`.
        tasks_limit: largest number of documents of each task, from its beginning, at least 1; null uses all.
        tasks_folder: a folder with YAML files of further tasks.
        dtype: type of the weights: `float32`, `bfloat16`, `float16`, or `auto` (the type in each checkpoint).
        json: print one JSON object instead of a table.
        png: path of a figure of layers, perplexity and size; null draws none.
        trust_remote_code: run code that comes with the models. gqaprune loads pruned checkpoints without it.

    Raises:
        ValueError: if a model, corpus or task cannot be read, or a number is out of its bounds.
    """
    _check_settings(
        models, dtype, png, eval_tokens=eval_tokens, prompt=prompt, generated=generated, tasks_limit=tasks_limit
    )
    chosen = None if tasks is None else Tasks(tasks.split(","), tasks_limit, tasks_folder)
    lengths = (prompt, generated) if speed else None
    measuring = Measuring(eval_window, eval_stride, eval_tokens, bos, lengths, chosen, dtype, trust_remote_code)
    was_quiet, console.quiet = console.quiet, console.quiet or json
    try:
        comparison = measure_models(models, corpora, measuring)
    finally:
        console.quiet = was_quiet
    if png is not None:
        save_figure(draw_comparison(comparison), Path(png))
    if json:
        print(json_format.dumps(comparison.to_dict(), indent=1))
    else:
        SafeConsole().print(build_comparison_table(comparison))


def _check_settings(models: Sequence[str], dtype: str, png: str | None, **counts: int | None) -> None:
    if len(models) < 2:
        raise ValueError(f"compare needs two models or more, got {len(models)}: use gqaprune inspect for a single one")
    check_dtype(dtype)
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if png is not None and (not Path(png).parent.is_dir() or Path(png).is_dir()):
        raise ValueError(f"cannot write a figure to {png}: choose a file in a folder that exists")
