"""Describe the commands. It imports nothing of gqaprune, so that `gqaprune --help` is fast."""

from textwrap import fill

DESCRIPTIONS: dict[str, str] = {
    "fit": "Calibrate, prune, fine-tune, measure and save a model. Settings come from YAML files and the command line.",
    "validate": "Measure perplexity on the validation corpora of any model, dense or pruned.",
    "test": "Measure perplexity on the test corpora of any model, dense or pruned.",
    "predict": "Continue prompts with a pruned model and the dense one, side by side, and judge the pruned model's "
    "texts.",
    "prune": "Calibrate, prune and save a model, without training.",
    "compare": "Show models side by side, pruned or dense: sizes, perplexity, speed, memory, tasks.",
    "export": "Write a model, pruned or dense, in another format, or in 8 bits.",
    "inspect": "Print a model's shapes and parameters, and the memory that pruning and training need.",
    "search": "Find the split of attention and MLP (pruning.split) that costs the least perplexity on validation text. "
    "The model is scored once, and every split is cut and refitted on a copy. Steps, swaps and training are ignored.",
    "sweep": "Prune a model at several rates (--rates 0.1,0.2,0.3) to choose one, scoring it only once. Writes a "
    "table, a curve, and a checkpoint for each rate.",
}
"""Command -> description."""

_EXAMPLES = """Examples:
  gqaprune inspect FOLDER --write_config mine.yaml
  gqaprune fit --config mine.yaml
  gqaprune compare FOLDER lightning_logs/version_0/checkpoint"""


def describe_commands() -> str:
    """Describe the commands, each in a sentence or two, in the order of the work."""
    order = ["inspect", "prune", "fit", "search", "sweep", "compare", "export", "validate", "test", "predict"]
    lines = [_describe(name) for name in order]
    return "\n".join(
        [
            "gqaprune prunes GQA groups and MLP channels of causal LMs, repairs, fine-tunes, measures and saves them.",
            "",
            "Usage: gqaprune COMMAND [settings]",
            "",
            *lines,
            "",
            _EXAMPLES,
            "",
            "gqaprune COMMAND --help lists the most important settings, gqaprune COMMAND --help_all all of them.",
        ]
    )


def _describe(name: str) -> str:
    return fill(DESCRIPTIONS[name], 96, initial_indent=f"  {name:<10}", subsequent_indent=" " * 12)
