"""What the documents show is true: commands are parsed and run, links and settings exist, both READMEs are in step."""

import contextlib
import io
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

import gqaprune
from gqaprune.cli import main
from gqaprune.cli.arguments import TOOLS, make_tool_parser, spell_out
from gqaprune.cli.lightning_cli import PruningCLI
from gqaprune.commands.inspect import inspect
from gqaprune.data.calibration import CalibrationSet
from gqaprune.planning.config import PruningConfig

from tiny import DATA, copy_with_context, make_tokenizer

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
DOCS = sorted((ROOT / "docs").glob("*.md"))
RESULTS = [ROOT / "benchmarks/RESULTS.md", *sorted((ROOT / "benchmarks/results").glob("*.md"))]
PAGES = [*READMES, *DOCS, ROOT / "CONTRIBUTING.md", *RESULTS]

MARKS = ("GPU", "hub")
"""Words in the comment of a command that is not run, and why."""
LAUNCHERS = (["python", "cli.py"], ["configs/strategy/torchrun.sh"], ["sbatch", "configs/strategy/slurm.sbatch"])
"""What runs gqaprune besides its own name."""
SMALL = {"data": DATA, "pruning": {"repair": {"epochs": 1}}, "trainer": {"enable_progress_bar": False}}
"""Put after the configs of a command that is run, before its own settings."""
LESS = {"compare": ["--eval_tokens", "4096", "--prompt", "16", "--generated", "2"]}
"""Put after a tool's own arguments: less work."""
GROUPS = "model|data|pruning|export|guard|samples|search|sweep|trainer"
"""What settings' names begin with."""


@dataclass(frozen=True)
class Command:
    """A line of a bash block: where it is, its words, and its comment."""

    page: Path
    words: tuple[str, ...]
    comment: str

    def __str__(self) -> str:
        return f"{self.page.name}: {shlex.join(self.words)}"

    @property
    def arguments(self) -> list[str] | None:
        """What gqaprune gets; None where something else is run."""
        words = list(self.words)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        for launcher in (["gqaprune"], *LAUNCHERS):
            if words[: len(launcher)] == launcher:
                return words[len(launcher) :]
        return None

    @property
    def is_marked(self) -> bool:
        """Whether it needs what a test has not."""
        return any(re.search(rf"\b{mark}\b", self.comment) for mark in MARKS)


def read_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def read_commands(page: Path) -> list[Command]:
    lines = "\n".join(read_blocks(page, "bash")).replace("\\\n", " ").splitlines()
    split = (re.match(r"(.*?)(?:(?:^|\s+)#\s*(.*))?$", line) for line in lines if line.strip())
    found = [(match[1], match[2] or "") for match in split if match]
    return [Command(page, tuple(shlex.split(line)), comment) for line, comment in found if line]


def strip_comments(code: str) -> str:
    return re.sub(r"[ \t]+#.*$", "", code, flags=re.MULTILINE)


COMMANDS = [command for page in PAGES for command in read_commands(page)]
RUN = [
    command
    for command in {c.words: c for c in COMMANDS if c.page in [READMES[0], *DOCS]}.values()
    if command.arguments is not None and not command.is_marked
]


@pytest.fixture(scope="module")
def cli() -> PruningCLI:
    """The command line's parsers, made once; nothing is instantiated."""
    made = PruningCLI.__new__(PruningCLI)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        patch.setattr("sys.argv", ["gqaprune"])
        made.__init__(args=["fit", "--help"])  # type: ignore[misc]
    return made


@pytest.fixture(scope="module")
def settings(cli: PruningCLI) -> set[str]:
    """Every setting of every command, by its full name, and the groups that hold them."""
    parsers = cli._subcommand_parsers.values()
    names = {action.dest for parser in parsers for action in parser._actions}
    return {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}


def test_every_command_is_parsed_as_the_command_line_does(
    cli: PruningCLI, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    refused = []
    for command in COMMANDS:
        if command.arguments is None:
            continue
        name, *arguments = spell_out(list(command.arguments))
        parser = make_tool_parser(TOOLS[name]) if name in TOOLS else cli._subcommand_parsers[name]
        try:
            parser.parse_args(arguments)
        except ValueError as error:
            refused.append(f"{command}: {error}")
    assert refused == []
    assert sum(command.arguments is not None for command in COMMANDS) > 30


@pytest.fixture(scope="module")
def place(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the documents' names stand for something."""
    folder = tmp_path_factory.mktemp("docs")
    dense = folder / "path/to/model"
    copy_with_context(tiny_folder, dense)
    make_tokenizer([("e", "d"), ("r", "u")]).save_pretrained(dense)  # with merges, which GGUF asks for
    model, tokenizer = gqaprune.load(str(dense))
    config = PruningConfig(
        0.2, criterion="l2", allocation="uniform", repair={"method": "none"}, limits={"mlp_layers": (1, 3)}
    )
    plan, _ = gqaprune.prune(model, CalibrationSet([], source=str(dense)), config)
    gqaprune.save(model, tokenizer, folder / "pruned", plan)
    shutil.copytree(folder / "pruned", folder / "trained")
    (folder / "prompts.txt").write_text("The capital of France is\n")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    (folder / "configs").symlink_to(ROOT / "configs")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):  # as the first of the README's lines does
        inspect("path/to/model", write_config="mine.yaml")
    return folder


@pytest.mark.parametrize("command", RUN, ids=str)
def test_every_command_without_a_mark_runs_on_a_tiny_model(
    command: Command, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "torchao" in str(command) or "--quantization" in command.words:
        pytest.importorskip("torchao")
    shutil.copytree(place, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    words = command.arguments
    assert words is not None
    if "--config" in words:
        after = max(i for i, word in enumerate(words) if word == "--config") + 2
        words = [*words[:after], "--config", "small.yaml", *words[after:]]
    monkeypatch.setattr("sys.argv", ["gqaprune", *words, *LESS.get(words[0], [])])
    with torch.random.fork_rng():
        assert main() == 0, capsys.readouterr().err


def test_make_targets_exist() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    shown = [command for page in [*READMES, *DOCS] for command in read_commands(page) if not command.is_marked]
    others = {command.words for command in shown if not command.arguments}
    assert {words[0] for words in others} == {"make"}
    assert {words[1] for words in others} <= set(targets)


def test_both_readmes_have_the_same_commands_code_links_and_numbers() -> None:
    english, chinese = ([command.words for command in read_commands(page)] for page in READMES)
    assert english == chinese and len(english) > 8
    english, chinese = ([strip_comments(code) for code in read_blocks(page, "python")] for page in READMES)
    assert english == chinese

    texts = [page.read_text(encoding="utf-8") for page in READMES]
    links = [re.findall(r"\]\(([^)\s]+)\)", text) for text in texts]
    assert links[0][0] == "README.zh-CN.md" and links[1][0] == "README.md"
    translated = {link: link.replace(".md", ".zh-CN.md") for link in links[0][1:]}
    there = {link if not (ROOT / other).exists() else other for link, other in translated.items()}
    assert there == set(links[1][1:])  # pages that are in Chinese, too, are linked in Chinese
    assert texts[0].count("\n## ") == texts[1].count("\n## ")
    tables = [[line for line in text.splitlines() if line.startswith("| ")] for text in texts]
    numbers, settings = r"\d[\d,.]*\d|\d", r"`[^`]+`"
    assert len(tables[0]) == len(tables[1])
    for row, its_translation in zip(*tables, strict=True):
        for what in (numbers, settings):
            assert sorted(re.findall(what, row)) == sorted(re.findall(what, its_translation)), its_translation


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_point_to_what_exists(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    paths = {(page.parent / target).resolve() for target in targets if "://" not in target}
    assert {path for path in paths if not path.exists()} == set()


@pytest.mark.parametrize("page", [*READMES, *DOCS, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_settings_and_files_that_are_named_exist(page: Path, settings: set[str]) -> None:
    text = re.sub(r"^```python\n.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(rf"(?<![\w./-])(?:--)?((?:{GROUPS})\.\w+(?:\.\w+)*)", text))
    files = {name for name in named if name.split(".")[-1] in ("md", "png", "json", "yaml", "safetensors")}
    named = {re.sub(r"^model\.optimizer\..*", "model.optimizer", name) for name in named - files}
    assert named - settings == set()
    for path in set(re.findall(r"(?:configs|docs|benchmarks|gqaprune)/[\w./-]+\.\w+", text)):
        assert (ROOT / path).exists(), path


def test_every_setting_of_pruning_is_explained(settings: set[str]) -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in [READMES[0], *DOCS])
    own = {name for name in settings if name.startswith("pruning.")}
    assert {name for name in own if not re.search(rf"{re.escape(name)}\b", text)} == set()


def test_pages_of_results_are_short_and_all_named_by_the_first_one() -> None:
    first, *pages = RESULTS
    for page in pages:
        assert len(page.read_text().splitlines()) < 150, page.name
        assert f"](results/{page.name})" in first.read_text(), page.name
