"""A page for every configuration in `configs/`: its comment, the command that uses it, the file."""

import re
from pathlib import Path

from sitegen.settings import escape_prose

KINDS = {
    "": ("Models", "A whole run for one model."),
    "goal": ("Goals", "What to give up, and how much of it; added after a model's file."),
    "recovery": ("Recoveries", "How the pruned model is trained; added after a model's file."),
    "strategy": ("Machines", "What the run has to work on; added after a model's file."),
}
"""Folder in `configs/` -> heading and what its files have in common."""


def write_recipes(folder: Path, configs: Path) -> None:
    """Write a page for every file, and one that lists those of a folder.

    Raises:
        ValueError: if there is a folder that has no heading, or a file that does not begin with a comment.
    """
    folder.mkdir(parents=True)
    unknown = {path.parent.relative_to(configs).as_posix() for path in configs.rglob("*.yaml")} - {".", *KINDS}
    if unknown:
        raise ValueError(f"recipes of {', '.join(sorted(unknown))} have no heading: enter the folder in KINDS")
    for kind, (heading, description) in KINDS.items():
        paths = sorted((configs / kind).glob("*.yaml"))
        entries = []
        for path in paths:
            name = make_page_name(path.relative_to(configs))
            write_recipe(folder / f"{name}.md", path, configs)
            entries.append(f"{path.stem} <{name}>")
        lines = [f"# {heading}", "", description, ""]
        for path in paths:
            page = make_page_name(path.relative_to(configs))
            lines += [f"[{path.stem}]({page}.md)", f": {first_sentence(read_comment(path))}", ""]
        lines += ["```{toctree}", ":hidden:", "", *entries, "```", ""]
        (folder / f"all_{kind or 'model'}.md").write_text("\n".join(lines), encoding="utf-8")


def make_page_name(path: Path) -> str:
    """Name the page of a configuration, given its path inside `configs/`."""
    return path.with_suffix("").as_posix().replace("/", "_")


def write_recipe(page: Path, path: Path, configs: Path) -> None:
    """Write the page of one configuration."""
    name = path.relative_to(configs.parent).as_posix()
    added = "" if path.parent == configs else "--config mine.yaml "
    lines = [f"# {path.stem}", "", mark_code(read_comment(path)), ""]
    lines += ["```bash", f"gqaprune fit {added}--config {name}", "```", ""]
    if added:
        lines += [
            "`mine.yaml` is a model's file, such as `gqaprune inspect path/to/model --write-config mine.yaml` writes."
        ]
        lines += [""]
    lines += [f"The file, `{name}`:", "", "```yaml", path.read_text(encoding="utf-8").rstrip(), "```", ""]
    page.write_text("\n".join(lines), encoding="utf-8")


def read_comment(path: Path) -> str:
    """Read the comment that a configuration begins with, as one line.

    Raises:
        ValueError: if there is none.
    """
    comment = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
    if comment is None:
        raise ValueError(f"{path} needs a comment in its first line that says what it is for")
    return " ".join(line.removeprefix("#").strip() for line in comment[0].splitlines())


def first_sentence(comment: str) -> str:
    """The first sentence of a comment, as Markdown."""
    return mark_code(re.split(r"(?<=[^.][^.])\. (?=[A-Z])|; ", comment)[0].rstrip(".") + ".")


def mark_code(text: str) -> str:
    """Set options with their values and names of files as code, and escape the rest."""
    option, file = r"--[\w.]+ [\w/.]*\w", r"[\w/.]+\.(?:yaml|jsonl|md)"
    return escape_prose(re.sub(rf"({option}(?: {option})*|{file})", r"`\1`", text))
