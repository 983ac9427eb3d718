"""LightningCLI with `prune`, `search` and `sweep`, and settings of pruning beside those of model, data and trainer."""

import json
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import gqaprune
from gqaprune.callbacks import (
    CheckpointExport,
    KeepRunNote,
    PerplexityGuard,
    PredictionJudge,
    RunSummary,
    SampleGenerations,
    TaylorPruning,
)
from gqaprune.callbacks.lookup import get_run_folder
from gqaprune.callbacks.parts import check_own_parts, read_work
from gqaprune.cli.arguments import (
    DRY_RUN,
    SETTINGS,
    TOOLS,
    VERBOSE,
    PruningArgumentParser,
    fill_help,
    make_tool_parser,
    set_verbosity,
)
from gqaprune.cli.overview import DESCRIPTIONS
from gqaprune.cli.trainer import PruningTrainer, check_checkpoint, keep_going_without, split_over_all
from gqaprune.commands.dry_run import describe_dry_run
from gqaprune.common.atomic_files import check_can_be_folder
from gqaprune.common.console import console
from gqaprune.common.errors import first_line
from gqaprune.common.paths import expand_path
from gqaprune.common.renamed import GROUPS, describe_rename
from gqaprune.common.run_log import RunLog
from gqaprune.datamodules import TextDataModule
from gqaprune.models.sources import name_at_revision
from gqaprune.module import CausalLMModule
from gqaprune.placement.layer_store import Placement
from gqaprune.training.checkpoint_files import check_is_local
from gqaprune.training.launch import decide_on_rank_0
from gqaprune.training.lightning_internals import (
    SHARDED,
    add_subcommand,
    describe_subcommands,
    get_setting,
    get_subcommand_parsers,
    reserve_version,
)
from gqaprune.training.resume import FoundRun, find_run, read_plan

PATHS = (
    "ckpt_path",
    "export.folder",
    "model.plan",
    "model.recovery.teacher",
    "pruning.sensitivity.path",
    "pruning.stages",
    "search.folder",
    "sweep.folder",
    "trainer.default_root_dir",
)
"""Settings that name files or folders, besides those of models and texts, which are expanded where they are read."""


class PruningCLI(LightningCLI):
    """`gqaprune <command>`; the settings of pruning and export stand beside `model`, `data` and `trainer`."""

    def __init__(self, log: RunLog | None = None, named: Mapping[str, type] | None = None, **kwargs: Any) -> None:
        self._log = log
        self._named = named = named or {}
        self._numbered: TensorBoardLogger | None = None
        super().__init__(
            _find_base(named.get("model"), LightningModule, CausalLMModule),
            _find_base(named.get("data"), LightningDataModule, TextDataModule),
            subclass_mode_model="model" in named,
            subclass_mode_data="data" in named,
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
                add_subcommand(self, name, make_tool_parser(tool), DESCRIPTIONS[name])
            describe_subcommands(self, DESCRIPTIONS)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings in the order of the work, Lightning's own last; the tokenizer follows the model."""
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=self.subclass_mode_model)
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=self.subclass_mode_data)
        parser.add_lightning_class_args(CheckpointExport, "export")  # before pruning: it checks its folder first
        parser.add_lightning_class_args(SampleGenerations, "samples")  # likewise its prompts
        parser.add_class_arguments(TaylorPruning, "pruning", skip={"calibration"}, fail_untyped=False, sub_configs=True)
        parser.callback_keys.append("pruning")
        parser.add_lightning_class_args(PerplexityGuard, "guard")  # after pruning: it judges what that left
        self._link(parser)
        parser.add_lightning_class_args(PruningTrainer, "trainer")
        parser.add_argument("--verbose", **VERBOSE)
        parser.add_argument("--dry_run", **DRY_RUN)
        fill_help(parser)
        parser.set_defaults({f"trainer.{k}": v for k, v in self.trainer_defaults.items() if k != "callbacks"})

    def _link(self, parser: LightningArgumentParser) -> None:
        """Let the data's tokenizer follow the model, where both are gqaprune's or come from it."""
        if self._model_class is not CausalLMModule or self._datamodule_class is not TextDataModule:
            return
        model = "model.init_args" if self.subclass_mode_model else "model"
        data = "data.init_args" if self.subclass_mode_data else "data"
        names = [f"{model}.{name}" for name in ("pretrained", "revision") if self._has_setting("model", name)]
        compute = name_at_revision if len(names) == 2 else None
        parser.link_arguments(tuple(names) if compute else names[0], f"{data}.tokenizer", compute)
        if self._has_setting("model", "trust_remote_code"):
            parser.link_arguments(f"{model}.trust_remote_code", f"{data}.trust_remote_code")

    def _has_setting(self, part: str, name: str) -> bool:
        """Whether the class that is named for a part has a setting; ours have all."""
        return part not in self._named or name in signature(self._named[part]).parameters

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Go on with a run of the same settings that did not end: in its folder, from its last checkpoint."""
        super().parse_arguments(parser, args)
        own = self.config.get(self.config.get("subcommand", ""), self.config)  # Python can build all without running it
        _check_groups(own)
        for name in PATHS:
            if isinstance(value := own.get(name), str):
                own[name] = expand_path(value)
        set_verbosity(bool(own.verbose))
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
        is_there = path.is_file() or (path / SHARDED).is_file()
        model = settings.model.get("init_args", settings.model) if is_there else None
        if model is not None and "plan" in model:
            model.plan = read_plan(path) or model.plan

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to TensorBoard, without Lightning's placeholder metric: the summary logs the real one."""
        settings = get_setting(self, "trainer")
        if settings.barebones:
            kwargs["log_every_n_steps"] = None  # what Lightning takes it with
        elif settings.logger in (None, True):
            root, version = settings.default_root_dir or ".", self._folder.name if self._folder else None
            kwargs["logger"] = TensorBoardLogger(root, version=version, default_hp_metric=False)
            self._numbered = kwargs["logger"] if version is None else None
        if self.subcommand == "fit" and settings.logger is not False and not settings.barebones:
            given = settings.callbacks
            given = [given] if isinstance(given, Callback) else given or []
            if not any(isinstance(callback, LearningRateMonitor) for callback in given):
                self.trainer_defaults["callbacks"].append(LearningRateMonitor("step"))
        recovery = getattr(get_setting(self, "model"), "recovery", None)
        if self.subcommand == "fit" and recovery is not None and recovery.mode == "none":
            kwargs["limit_train_batches"] = 0
            if get_setting(self, "pruning").placement is not Placement.MEMORY:
                kwargs["limit_val_batches"] = 0  # Lightning's own check would run the whole model
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
        """Refuse a checkpoint that the strategy cannot go on from, or an unusable folder for logs, before any work.

        Raises:
            SystemExit: where the run was only to be described.
        """
        if self.subcommand is not None and get_setting(self, "dry_run"):
            self._describe_run()
            raise SystemExit(0)
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
        if self._log is not None and self.trainer.is_global_zero and not get_setting(self, "trainer").fast_dev_run:
            if self._numbered is not None:
                reserve_version(self._numbered)
            self._log.open(get_run_folder(self.trainer))

    def _describe_run(self) -> None:
        """Say what the run would do, hold and take."""
        check_own_parts(self.trainer, self.model, "dry_run", self.datamodule)
        data, pruning = self.datamodule, get_setting(self, "pruning").config
        trains = self.subcommand == "fit" and self.trainer.limit_train_batches != 0
        console.print(
            describe_dry_run(
                self.model.source,
                pruning,
                read_work(self.trainer, data, trains),
                self.model.recovery,
                self.trainer.strategy.root_device,
                data.training.window * data.training.batch_size,
                self.trainer.world_size,
            )
        )
        console.print("nothing was computed or written: the same command without --dry_run begins the work")

    def search(self, **kwargs: Any) -> None:
        """Search with the settings under `search`."""
        assert isinstance(self.trainer, PruningTrainer)
        self.trainer.search(**kwargs, settings=get_setting(self, "search"))

    def sweep(self, **kwargs: Any) -> None:
        """Sweep with the settings under `sweep`."""
        assert isinstance(self.trainer, PruningTrainer)
        self.trainer.sweep(**kwargs, settings=get_setting(self, "sweep"))


def _find_base(named: type | None, any_class: type, own: type) -> type:
    """The class whose subclasses a part may be: what is named may come from ours, or be any.

    Raises:
        ValueError: if it is none of either.
    """
    if named is None or issubclass(named, own):
        return own
    if not issubclass(named, any_class):
        raise ValueError(f"{named.__module__}.{named.__qualname__} is no {any_class.__name__}: name one")
    return any_class


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
