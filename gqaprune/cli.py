"""The `gqaprune` command: LightningCLI with `fit`, `validate`, `test`, `predict`, `prune`, `search`, `sweep`."""

import json
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from inspect import Parameter, signature
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from safetensors import SafetensorError

import gqaprune
from gqaprune.callbacks import (
    CheckpointExport,
    KeepRunNote,
    PerplexityGuard,
    PredictionJudge,
    RateSweep,
    RunSummary,
    SampleGenerations,
    SplitSearch,
    TaylorPruning,
)
from gqaprune.callbacks.lookup import get_run_folder
from gqaprune.checkpoints.formats import FORMATS, describe_formats
from gqaprune.commands.compare import compare
from gqaprune.commands.export import export
from gqaprune.commands.inspect import inspect
from gqaprune.commands.search import SearchSettings
from gqaprune.commands.sweep import SweepSettings
from gqaprune.common.atomic_files import check_can_be_folder
from gqaprune.common.console import console, keep_streams_safe, logger
from gqaprune.common.cpu import avoid_illegal_instructions
from gqaprune.common.disk_errors import explain_disk_errors
from gqaprune.common.errors import first_line
from gqaprune.common.ranks import RankEndedError
from gqaprune.common.renamed import GROUPS, describe_rename, find_renamed_setting
from gqaprune.common.run_log import RunLog
from gqaprune.common.safe_text import for_log
from gqaprune.common.stop_signals import Stopped, stop_signals
from gqaprune.datamodules import TextDataModule
from gqaprune.models.sources import name_at_revision
from gqaprune.module import CausalLMModule
from gqaprune.planning.allocation import describe_allocations
from gqaprune.training.checkpoint_files import check_is_local
from gqaprune.training.launch import decide_on_rank_0, end_with_launcher
from gqaprune.training.lightning_internals import (
    SHARDED,
    add_subcommand,
    describe_subcommands,
    get_parallel_sizes,
    get_setting,
    get_subcommand_parsers,
    reserve_version,
    set_data_parallel_size,
)
from gqaprune.training.resume import FoundRun, find_run, is_whole, read_plan, read_strategy

DESCRIPTIONS = {
    "fit": "Calibrate, prune, fine-tune, measure and save a model. Settings come from YAML files and the command line.",
    "validate": "Measure perplexity on the validation corpora of any model, dense or pruned.",
    "test": "Measure perplexity on the test corpora of any model, dense or pruned.",
    "predict": "Continue prompts with a pruned model and the dense one, side by side, and judge what it writes.",
    "prune": "Calibrate, prune and save a model, without training.",
    "compare": "Show models side by side, pruned or dense: what they hold, perplexity, speed, memory, tasks.",
    "export": f"Write a model, pruned or dense, in another format: {', '.join(FORMATS)}; or in 8 bits.",
    "inspect": "Print what a model holds and the memory that work on it needs, from its config.",
    "search": "Find the split of attention and MLP (pruning.split) that costs the least perplexity on validation text. "
    "It is scored once; every split is cut and refitted on a copy: later steps, swaps and training are not seen.",
    "sweep": "Prune a model at several rates (--rates 0.1,0.2,0.3), scored and measured once, to choose one: a table, "
    "a curve, and the checkpoint of each.",
}


VERBOSE: Mapping[str, Any] = {
    "action": "store_true",
    "help": "also show the messages of Lightning and transformers",
}
"""The setting of every command for what is hidden by default."""

HELP: Mapping[str, Callable[[], str]] = {
    "export.format": describe_formats,
    "format": describe_formats,
    "pruning.allocation": describe_allocations,
}
"""Settings whose values a registry names: setting -> what writes its help."""

SETTINGS: Mapping[str, type] = {"search": SearchSettings, "sweep": SweepSettings}
"""Commands of our own that have settings: name of both -> class."""

TOOLS: Mapping[str, Callable[..., None]] = {"compare": compare, "export": export, "inspect": inspect}
"""Commands that need no trainer: name -> function, whose arguments are the command's."""


class PruningArgumentParser(LightningArgumentParser):
    """Says what is wrong with an argument in the one sentence that every other error gets."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing the usage of some hundred arguments."""
        command = self.prog.replace(" [options]", "")
        reason = " ".join(message.split()).rstrip(".")
        if (renamed := find_renamed_setting(reason)) is not None:
            reason = renamed
        elif 'key "pruning.split"' in reason:
            reason = 'pruning.split needs quotes in YAML, such as "2:8": without them YAML reads a number in base 60'
        raise ValueError(f"{reason}; `{command} --help` lists the settings") from ex


class PruningTrainer(Trainer):
    """Lightning's Trainer, which can also prune without training."""

    def save_checkpoint(self, filepath: str | Path, *arguments: Any, **options: Any) -> None:
        """Save what training can be resumed from; a full disk is said with the file, what it takes and what is free."""
        module, optimizers = self.lightning_module, self.optimizers
        states = (value for optimizer in optimizers for state in optimizer.state.values() for value in state.values())
        tensors = (value for value in (*module.parameters(), *states) if isinstance(value, torch.Tensor))
        with explain_disk_errors(Path(filepath), sum(tensor.nbytes for tensor in tensors)):
            super().save_checkpoint(filepath, *arguments, **options)

    def prune(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        """Calibrate, prune and save a model, without training."""
        # A fit without steps: the callbacks do the work on any strategy, in the same order.
        self.limit_train_batches = 0
        self.limit_val_batches = 0
        self.fit(model, datamodule=datamodule)

    def search(self, model: LightningModule, datamodule: LightningDataModule, settings: SearchSettings) -> None:
        """Find the split of attention and MLP at which pruning costs least."""
        callbacks: list[Callback] = getattr(self, "callbacks", [])
        pruning = next(callback for callback in callbacks if isinstance(callback, TaylorPruning))
        left_out = (TaylorPruning, PerplexityGuard, CheckpointExport)
        others = [callback for callback in callbacks if not isinstance(callback, left_out)]
        self.callbacks = [SplitSearch(pruning, settings), *others]
        self.limit_test_batches = 0  # test text chooses no settings
        self.prune(model, datamodule)

    def sweep(self, model: LightningModule, datamodule: LightningDataModule, settings: SweepSettings) -> None:
        """Prune at several rates, to choose one by what each costs."""
        callbacks: list[Callback] = getattr(self, "callbacks", [])
        pruning = next(callback for callback in callbacks if isinstance(callback, TaylorPruning))
        export = next(callback for callback in callbacks if isinstance(callback, CheckpointExport))
        left_out = (TaylorPruning, PerplexityGuard, CheckpointExport)
        others = [callback for callback in callbacks if not isinstance(callback, left_out)]
        self.callbacks = [RateSweep(pruning, export, settings), *others]
        self.prune(model, datamodule)


class PruningCLI(LightningCLI):
    """`gqaprune <command>`; the settings of pruning and export stand beside `model`, `data` and `trainer`."""

    def __init__(self, log: RunLog | None = None, **kwargs: Any) -> None:
        self._log = log
        self._numbered: TensorBoardLogger | None = None
        super().__init__(
            CausalLMModule,
            TextDataModule,
            trainer_class=PruningTrainer,
            parser_class=PruningArgumentParser,
            trainer_defaults={
                "log_every_n_steps": 1,
                "enable_model_summary": False,
                "callbacks": [PredictionJudge(releases=True), RunSummary()],  # which tells what was judged
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,  # would hold the dense parameters: it is built before pruning
            parser_kwargs={
                "description": "Prune GQA groups and MLP channels of causal LMs, recover, measure, save.",
                "version": gqaprune.__version__,
            },
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """LightningCLI's commands and our own, with the arguments that are not settings."""
        own = {"model", "datamodule"}
        # `verbose` of validate and test would hide their results, `weights_only false` would run what files say.
        hidden = {"verbose", "weights_only"}
        of_lightning = {name: skipped | hidden for name, skipped in LightningCLI.subcommands().items()}
        return {**of_lightning, "prune": own, **{name: own | {"settings"} for name in SETTINGS}}

    def setup_parser(self, add_subcommands: bool, *arguments: Any) -> None:
        """Describe the commands as they are here, not as Lightning's own docstrings have them."""
        super().setup_parser(add_subcommands, *arguments)
        if add_subcommands:
            parsers = get_subcommand_parsers(self)
            for name, settings in SETTINGS.items():
                groups = parsers[name].groups
                assert groups is not None
                groups.pop(name)  # the method's own, empty, which would keep the settings from that name
                parsers[name].add_class_arguments(settings, name)
            for name, parser in parsers.items():
                parser.description = DESCRIPTIONS[name]
            for name, tool in TOOLS.items():
                add_subcommand(self, name, _make_tool_parser(tool), DESCRIPTIONS[name])
            describe_subcommands(self, DESCRIPTIONS)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings in the order of the work, Lightning's own last; the tokenizer follows the model."""
        parser.add_lightning_class_args(CausalLMModule, "model")
        parser.add_lightning_class_args(TextDataModule, "data")
        parser.add_lightning_class_args(CheckpointExport, "export")  # before pruning: it checks its folder first
        parser.add_lightning_class_args(SampleGenerations, "samples")  # likewise its prompts
        parser.add_lightning_class_args(TaylorPruning, "pruning")
        parser.add_lightning_class_args(PerplexityGuard, "guard")  # after pruning: it judges what that left
        parser.link_arguments(("model.pretrained", "model.revision"), "data.tokenizer", name_at_revision)
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")
        parser.add_lightning_class_args(PruningTrainer, "trainer")
        parser.add_argument("--verbose", **VERBOSE)
        _fill_help(parser)
        parser.set_defaults({f"trainer.{k}": v for k, v in self.trainer_defaults.items() if k != "callbacks"})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Go on with a run of the same settings that did not end: in its folder, from its last checkpoint."""
        super().parse_arguments(parser, args)
        own = self.config.get(self.config.get("subcommand", ""), self.config)  # Python can build all without running it
        _check_groups(own)
        _set_verbosity(bool(own.verbose))
        self._folder: Path | None = None
        if self.config.get("subcommand") == "fit":
            settings, root = self.config.fit, Path(self.config.fit.trainer.default_root_dir or ".")
            listed = _list_settings(parser, self.config)
            asked = settings.ckpt_path
            decision = decide_on_rank_0(lambda is_first: find_run(root, listed, asked, is_first).to_json())
            found = FoundRun.from_json(decision)
            settings.ckpt_path = found.checkpoint
            if found.folder is not None:
                self._folder, self.save_config_kwargs = found.folder, {"overwrite": True}
            self.trainer_defaults["callbacks"] = [RunSummary(), KeepRunNote(root, listed, found)]

    def _parse_ckpt_path(self) -> None:
        """Take over a checkpoint's plan, whose shapes its weights have.

        Lightning would take all of the model's settings: those of the run that wrote it, not of the command.
        """
        settings = self.config.get(self.config.get("subcommand", ""), {})
        path = Path(settings.get("ckpt_path") or "")
        check_is_local(settings.get("ckpt_path") or "")
        if path.is_file() or (path / SHARDED).is_file():
            settings.model.plan = read_plan(path) or settings.model.plan

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to TensorBoard, without Lightning's placeholder metric: the summary logs the real one."""
        settings = get_setting(self, "trainer")
        if settings.logger in (None, True):
            root, version = settings.default_root_dir or ".", self._folder.name if self._folder else None
            kwargs["logger"] = TensorBoardLogger(root, version=version, default_hp_metric=False)
            self._numbered = kwargs["logger"] if version is None else None
        if self.subcommand == "fit" and get_setting(self, "model").recovery.mode == "none":
            kwargs["limit_train_batches"] = 0
        if self.subcommand == "predict":
            kwargs["use_distributed_sampler"] = False  # every rank writes every text: models split over them need it
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (RuntimeError, TypeError, NotImplementedError, ImportError) as error:
            raise ValueError(f"trainer: {first_line(error)}") from None
        for own in trainer.loggers:
            keep_going_without(own)
        return trainer

    def after_instantiate_classes(self) -> None:
        """Refuse a checkpoint that the strategy cannot go on from, or an unusable folder for logs, before any work."""
        if self.subcommand == "fit" and (path := self.config_init.fit.ckpt_path):
            check_checkpoint(Path(path), self.trainer)
        split_over_all(self.trainer)
        for own in self.trainer.loggers:
            if isinstance(own, (TensorBoardLogger, CSVLogger)):
                check_can_be_folder(Path(own.log_dir))
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        check_can_be_folder(folder)
        path = folder / "config.yaml"
        callbacks: list[Callback] = getattr(self.trainer, "callbacks", [])
        if path.exists() and any(isinstance(one, SaveConfigCallback) and not one.overwrite for one in callbacks):
            raise ValueError(
                f"{path} is there already, and this run would write its settings there: move it away, set "
                "trainer.default_root_dir to another folder, or leave trainer.logger out, which numbers its runs"
            )
        if self._log is not None and self.trainer.is_global_zero:
            if self._numbered is not None:
                reserve_version(self._numbered)
            self._log.open(get_run_folder(self.trainer))

    def search(self, **kwargs: Any) -> None:
        """Search with the settings under `search`."""
        assert isinstance(self.trainer, PruningTrainer)
        self.trainer.search(**kwargs, settings=get_setting(self, "search"))

    def sweep(self, **kwargs: Any) -> None:
        """Sweep with the settings under `sweep`."""
        assert isinstance(self.trainer, PruningTrainer)
        self.trainer.sweep(**kwargs, settings=get_setting(self, "sweep"))


def keep_going_without(own: Logger) -> None:
    """Let nothing that a logger cannot write end a run; it is said once."""
    said: list[str] = []

    def forgive(method: Callable[..., object]) -> Callable[..., object]:
        @wraps(method)
        def call(*arguments: Any, **options: Any) -> object:
            try:
                return method(*arguments, **options)
            except Exception as error:  # whatever it is, the run is worth more
                if not said:
                    said.append(first_line(error.__cause__ or error))  # Lightning blames the value for a full disk
                    console.print(f"{type(own).__name__} is not whole: {said[0]}")
                return None

        return call

    for name in ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint"):
        setattr(own, name, forgive(getattr(own, name)))


def split_over_all(trainer: Trainer) -> None:
    """Make `data_parallel_size: auto` without tensor parallelism all processes, for Lightning's is one a node."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and get_parallel_sizes(strategy) == ("auto", 1):
        set_data_parallel_size(strategy, trainer.num_devices * trainer.num_nodes)


def check_checkpoint(path: Path, trainer: Trainer) -> None:
    """Refuse to go on from a checkpoint of weights alone, or of a strategy whose checkpoints the trainer's cannot read.

    Raises:
        ValueError: with what can.
    """
    if not path.exists() and str(path) not in ("last", "best", "hpc"):
        raise ValueError(f"no checkpoint at {path}: name one, or leave --ckpt_path out to begin anew")
    if not path.exists():
        return
    name = type(trainer.strategy).__name__
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ValueError(f"{name} goes on from nothing but files that have to be unpickled: begin anew, or under FSDP")
    is_sharding = isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy))
    if is_sharding != path.is_dir():
        kind, other = ("one file", "folders") if is_sharding else ("a folder of shards", "single files")
        raise ValueError(
            f"{name} goes on from {other} and {path} is {kind}: set trainer.strategy to what wrote it; one device, "
            "ddp, ModelParallelStrategy with save_distributed_checkpoint false and FSDPStrategy with state_dict_type "
            "full write single files"
        )
    if is_sharding and (writer := read_strategy(path)) != name:
        raise ValueError(f"{name} cannot read what {writer} wrote, {path}: set trainer.strategy to {writer}")
    if not is_whole(path):
        raise ValueError(
            f"{path} holds weights alone, without what training goes on with: write whole checkpoints "
            "(save_weights_only false), and begin anew with --ckpt_path null"
        )


def _check_groups(settings: Namespace) -> None:
    """Refuse a value where a group of settings has to be, which the parser lets pass.

    Raises:
        ValueError: with the name that the value's setting has now.
    """
    for name in GROUPS:
        if (value := settings.get(name)) is not None and not isinstance(value, (Namespace, dict)):
            raise ValueError(f"{name} is a group of settings, got {value!r}: {describe_rename(name)}")


def _list_settings(parser: LightningArgumentParser, config: Any) -> dict[str, Any]:
    """All settings of a command as plain data, by their full names, without the place that it begins at."""
    text = parser.dump(config, format="json", skip_none=False, skip_link_targets=False)
    dumped = json.loads(text, parse_constant=str)  # infinity is no JSON, which a run's note is
    flat: dict[str, Any] = {}

    def add(values: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict) and value:
                add(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = value

    add(dumped[config["subcommand"]], "")
    return {name: value for name, value in flat.items() if name not in ("config", "ckpt_path", "verbose")}


def run_tool(name: str, arguments: list[str]) -> None:
    """Run a command that needs no trainer."""
    parser = _make_tool_parser(TOOLS[name], f"gqaprune {name}")
    parser.description = DESCRIPTIONS[name]
    settings = parser.parse_args(arguments)
    _set_verbosity(settings.pop("verbose"))
    TOOLS[name](**parser.instantiate_classes(settings).as_dict())


def _make_tool_parser(tool: Callable[..., None], prog: str | None = None) -> PruningArgumentParser:
    parser = PruningArgumentParser(prog=prog)
    required = [one for one in signature(tool).parameters.values() if one.default is Parameter.empty]
    several: set[str | int] = {one.name for one in required if one.annotation == list[str]}
    for name in several:  # added by itself: a list would else be one argument, in brackets
        parser.add_argument(str(name), nargs="+", type=str, help="folders, .gguf files or hub names")
    parser.add_argument("--verbose", **VERBOSE)
    parser.add_function_arguments(tool, as_positional=len(required) == 1, skip=several)  # what a tool is about
    _fill_help(parser)
    return parser


def _fill_help(parser: LightningArgumentParser) -> None:
    """Describe settings that registries know the values of, whatever their docstrings say."""
    for action in parser._actions:
        if action.dest in HELP:
            action.help = HELP[action.dest]()


def spell_out(arguments: list[str]) -> list[str]:
    """Arguments as parsers know them, of those that people type.

    Options may have hyphens for underscores, switches of commands without a trainer may stand alone, and `sweep` takes
    its own settings without their group, rates as a list with commas.
    """
    own = {f"--{one.name}" for one in fields(SweepSettings)} if arguments[:1] == ["sweep"] else set()
    tool = TOOLS.get(arguments[0]) if arguments else None
    known = signature(tool).parameters.values() if tool is not None else ()
    switches = {f"--{one.name}" for one in known if one.annotation is bool}
    spelled = []
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        option, equals, value = argument.partition("=")
        if option.startswith("--"):
            option = "--" + option[2:].replace("-", "_")
            option = f"--sweep.{option[2:]}" if option in own else option
        if option in switches and not equals and following.lower() not in ("true", "false"):
            equals, value = "=", "true"
        spelled.append(option + equals + value)
    for index, argument in enumerate(spelled):  # Python's own lists have brackets, as YAML's
        option, equals, value = argument.partition("=")
        if option == "--sweep.rates" and equals and not value.startswith("["):
            spelled[index] = f"{option}=[{value}]"
        elif spelled[index - 1] == "--sweep.rates" and index and not argument.startswith(("[", "--")):
            spelled[index] = f"[{argument}]"
    return spelled


def main() -> int:
    """Run the command line. Returns the exit code: 1 after an error that the user can mend, said in one sentence."""
    sys.argv[1:] = spell_out(sys.argv[1:])
    avoid_illegal_instructions()
    stop_signals.install()
    end_with_launcher()
    try:
        with keep_streams_safe() as output, RunLog() as log:
            code = _run(log)
            output.flush()
            if output.error is None:
                return code
            _say(f"gqaprune: standard output is not whole: {output.error.strerror or output.error}")
            return code or int(set(sys.argv[1:2]) <= TOOLS.keys())  # what they print is their work
    finally:
        stop_signals.restore()


def _run(log: RunLog) -> int:
    try:
        if sys.argv[1:2] and sys.argv[1] in TOOLS:
            run_tool(sys.argv[1], sys.argv[2:])
        else:
            PruningCLI(log)
    except (ValueError, OSError, SafetensorError, MisconfigurationException) as error:  # the third: a full disk, too
        _say(f"gqaprune: error: {error}")
        return 1
    except RuntimeError as error:
        cause = error if isinstance(error, RankEndedError) else error.__cause__
        if isinstance(cause, Stopped):
            return _say_stopped(128 + cause.number)
        if not isinstance(cause, RankEndedError):
            raise
        _say(f"gqaprune: error: {cause}{_describe_restart()}")
        return cause.code
    except (KeyboardInterrupt, SystemExit) as stop:
        is_interrupt = isinstance(stop.__context__ or stop, KeyboardInterrupt)  # Lightning makes it an exit
        if not is_interrupt and getattr(stop, "code", None) in (None, 0):
            raise
        return _say_stopped(128 + signal.SIGINT if is_interrupt else int(getattr(stop, "code", 1)))
    return 0


def _say_stopped(code: int) -> int:
    _say(f"gqaprune: stopped{_describe_restart()}")
    return code


def _describe_restart() -> str:
    return "; the same command goes on from here" if {"fit", "prune"} & set(sys.argv[1:]) else ""


def _say(sentence: str) -> None:
    """Say what ended the command, on the console and in the run's log."""
    sentence = for_log(" ".join(sentence.split()))
    print(sentence, file=sys.stderr)
    logger.error("%s", sentence)


def _set_verbosity(is_verbose: bool) -> None:
    """Leave the console to the stages, the table and what needs attention, or show other libraries' messages, too."""
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO if is_verbose else logging.WARNING)
    if is_verbose:
        transformers.logging.set_verbosity_info()
        transformers.logging.enable_progress_bar()
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    warnings.filterwarnings("ignore", message=r".*self\.log\('ppl/.*sync_dist=True.*")  # summed before it is logged
