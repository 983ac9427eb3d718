"""What the commands are, in words; it imports nothing, so that `gqaprune --help` is there at once."""

from textwrap import fill

DESCRIPTIONS: dict[str, str] = {
    "fit": "Calibrate, prune, fine-tune, measure and save a model. Settings come from YAML files and the command line.",
    "validate": "Measure perplexity on the validation corpora of any model, dense or pruned.",
    "test": "Measure perplexity on the test corpora of any model, dense or pruned.",
    "predict": "Continue prompts with a pruned model and the dense one, side by side, and judge what it writes.",
    "prune": "Calibrate, prune and save a model, without training.",
    "compare": "Show models side by side, pruned or dense: what they hold, perplexity, speed, memory, tasks.",
    "export": "Write a model, pruned or dense, in another format, or in 8 bits.",
    "inspect": "Print what a model holds and the memory that work on it needs, from its config.",
    "search": "Find the split of attention and MLP (pruning.split) that costs the least perplexity on validation text. "
    "It is scored once; every split is cut and refitted on a copy: later steps, swaps and training are not seen.",
    "sweep": "Prune a model at several rates (--rates 0.1,0.2,0.3), scored and measured once, to choose one: a table, "
    "a curve, and the checkpoint of each.",
}
"""Command -> what it does."""

_EXAMPLES = """Examples:
  gqaprune inspect FOLDER --write_config mine.yaml
  gqaprune fit --config mine.yaml
  gqaprune compare FOLDER lightning_logs/version_0/checkpoint"""


def describe_commands() -> str:
    """The commands, each with a sentence or two, in the order of the work."""
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
            "gqaprune COMMAND --help lists the settings that matter, gqaprune COMMAND --help_all all of them.",
        ]
    )


def _describe(name: str) -> str:
    return fill(DESCRIPTIONS[name], 96, initial_indent=f"  {name:<10}", subsequent_indent=" " * 12)
