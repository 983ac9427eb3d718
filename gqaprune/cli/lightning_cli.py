"""LightningCLI with the commands `prune`, `search` and `sweep` and with the settings of pruning and export."""

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
"""Settings that name files or folders; those of models and texts are expanded where they are read."""


class PruningCLI(LightningCLI):
    """`gqaprune <command>`, with settings of pruning and export beside `model`, `data` and `trainer`."""

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
                "callbacks": [PredictionJudge(releases=True), RunSummary()],  # the summary shows the judge's results
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,  # Lightning would build it before pruning, with the dense parameters
            parser_kwargs={
                "description": "Prune GQA groups and MLP channels of causal LMs, recover, measure, save.",
                "version": gqaprune.__version__,
            },
            **kwargs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's commands and gqaprune's, with the arguments that are not settings."""
        parts = {"model", "datamodule"}
        # `verbose` of validate and test would hide their results; `weights_only false` would run code in files.
        hidden = {"verbose", "weights_only"}
        of_lightning = {name: skipped | hidden for name, skipped in LightningCLI.subcommands().items()}
        return {**of_lightning, "prune": parts, **{name: parts | {"settings"} for name in SETTINGS}}

    def setup_parser(self, add_subcommands: bool, *arguments: Any) -> None:
        """Add the commands that need no trainer, and replace Lightning's descriptions of the others."""
        super().setup_parser(add_subcommands, *arguments)
        if add_subcommands:
            parsers = get_subcommand_parsers(self)
            for name, settings in SETTINGS.items():
                groups = parsers[name].groups
                assert groups is not None
                groups.pop(name)  # the method's empty group, which would block the name
                parsers[name].add_class_arguments(settings, name)
            for name, parser in parsers.items():
                parser.description = DESCRIPTIONS[name]
            for name, tool in TOOLS.items():
                add_subcommand(self, name, make_tool_parser(tool), DESCRIPTIONS[name])
            describe_subcommands(self, DESCRIPTIONS)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add settings in the order of the work, Lightning's last; the tokenizer follows the model."""
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=self.subclass_mode_model)
        is_needed = self._named.get("data") is not LightningDataModule
        parser.add_lightning_class_args(
            self._datamodule_class, "data", subclass_mode=self.subclass_mode_data, required=is_needed
        )
        parser.add_lightning_class_args(CheckpointExport, "export")  # before pruning: it checks its folder first
        parser.add_lightning_class_args(SampleGenerations, "samples")  # before pruning: it reads its prompts first
        parser.add_class_arguments(TaylorPruning, "pruning", skip={"calibration"}, fail_untyped=False, sub_configs=True)
        parser.callback_keys.append("pruning")
        parser.add_lightning_class_args(PerplexityGuard, "guard")  # after pruning: it judges the pruned model
        self._link(parser)
        parser.add_lightning_class_args(PruningTrainer, "trainer")
        parser.add_argument("--verbose", **VERBOSE)
        parser.add_argument("--dry_run", **DRY_RUN)
        fill_help(parser)
        parser.set_defaults({f"trainer.{k}": v for k, v in self.trainer_defaults.items() if k != "callbacks"})

    def _link(self, parser: LightningArgumentParser) -> None:
        """Let the data's tokenizer follow the model, if the classes of both come from gqaprune."""
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
        """Return whether the class that is named for a part has a setting; gqaprune's classes have all."""
        return part not in self._named or name in signature(self._named[part]).parameters

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments, and find a run with the same settings to resume, with its folder and checkpoint."""
        super().parse_arguments(parser, args)
        values = self.config.get(self.config.get("subcommand", ""), self.config)  # no subcommand when used from Python
        _check_groups(values)
        for name in PATHS:
            if isinstance(value := values.get(name), str):
                values[name] = expand_path(value)
        set_verbosity(bool(values.verbose))
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
        """Use a checkpoint's plan, because its weights have the plan's shapes.

        Lightning would use all model settings of the run that wrote the checkpoint instead of the command's.
        """
        settings = self.config.get(self.config.get("subcommand", ""), {})
        path = Path(settings.get("ckpt_path") or "")
        check_is_local(settings.get("ckpt_path") or "")
        is_there = path.is_file() or (path / SHARDED).is_file()
        model = settings.model.get("init_args", settings.model) if is_there else None
        if model is not None and "plan" in model:
            model.plan = read_plan(path) or model.plan

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; it logs to TensorBoard without Lightning's placeholder metric, which the summary logs."""
        settings = get_setting(self, "trainer")
        if settings.barebones:
            kwargs["log_every_n_steps"] = None  # Lightning requires this with `barebones`
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
                kwargs["limit_val_batches"] = 0  # Lightning's sanity check would run the whole model
        if self.subcommand == "predict":
            kwargs["use_distributed_sampler"] = False  # every rank continues every prompt: sharded models need that
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (RuntimeError, TypeError, NotImplementedError, ImportError) as error:
            raise ValueError(f"trainer: {first_line(error)}") from None
        for logger in trainer.loggers:
            keep_going_without(logger)
        return trainer

    def after_instantiate_classes(self) -> None:
        """Check, before any work, that the strategy can resume from the checkpoint and that logs can be written.

        Raises:
            SystemExit: after a dry run.
        """
        if self.subcommand is not None and get_setting(self, "dry_run"):
            self._describe_run()
            raise SystemExit(0)
        if self.subcommand == "fit" and (path := self.config_init.fit.ckpt_path):
            check_checkpoint(Path(path), self.trainer)
        split_over_all(self.trainer)
        for logger in self.trainer.loggers:
            if isinstance(logger, (TensorBoardLogger, CSVLogger)):
                check_can_be_folder(Path(logger.log_dir))
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        check_can_be_folder(folder)
        path = folder / "config.yaml"
        callbacks: list[Callback] = getattr(self.trainer, "callbacks", [])
        if path.exists() and any(isinstance(one, SaveConfigCallback) and not one.overwrite for one in callbacks):
            raise ValueError(
                f"{path} already exists, and this run would write its settings there: move it away, set "
                "trainer.default_root_dir to another folder, or leave trainer.logger out, so that runs are numbered"
            )
        if self._log is not None and self.trainer.is_global_zero and not get_setting(self, "trainer").fast_dev_run:
            if self._numbered is not None:
                reserve_version(self._numbered)
            self._log.open(get_run_folder(self.trainer))

    def _describe_run(self) -> None:
        """Print the work, memory and time of the run."""
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
        console.print("nothing was computed or written; run the same command without --dry_run to start")

    def search(self, **kwargs: Any) -> None:
        """Search with the settings under `search`."""
        assert isinstance(self.trainer, PruningTrainer)
        self.trainer.search(**kwargs, settings=get_setting(self, "search"))

    def sweep(self, **kwargs: Any) -> None:
        """Sweep with the settings under `sweep`."""
        assert isinstance(self.trainer, PruningTrainer)
        self.trainer.sweep(**kwargs, settings=get_setting(self, "sweep"))


def _find_base(named: type | None, any_class: type, own: type) -> type:
    """Return the base class of a part of the command line: gqaprune's if the named class inherits from it, else any.

    Raises:
        ValueError: if the named class is not of the right kind.
    """
    if named is None or issubclass(named, own):
        return own
    if not issubclass(named, any_class):
        raise ValueError(
            f"{named.__module__}.{named.__qualname__} is not a {any_class.__name__}: name a class that inherits from it"
        )
    return any_class


def _check_groups(settings: Namespace) -> None:
    """Raise an error if a group of settings is given a single value, which the parser accepts.

    Raises:
        ValueError: with the current name of the setting.
    """
    for name in GROUPS:
        if (value := settings.get(name)) is not None and not isinstance(value, (Namespace, dict)):
            raise ValueError(f"{name} is a group of settings, got {value!r}: {describe_rename(name)}")


def _list_settings(parser: LightningArgumentParser, config: Any) -> dict[str, Any]:
    """List all settings of a command as plain data by their full names, without the checkpoint it resumes from."""
    text = parser.dump(config, format="json", skip_none=False, skip_link_targets=False)
    dumped = json.loads(text, parse_constant=str)  # infinity as a string, because a run's note is valid JSON
    flat: dict[str, Any] = {}

    def add(values: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict) and value:
                add(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = value

    add(dumped[config["subcommand"]], "")
    return {name: value for name, value in flat.items() if name not in ("config", "ckpt_path", "verbose")}
