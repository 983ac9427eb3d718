"""Modules and data modules of other projects on the command line, and the sentences about what is not there."""

import json
import sys
from pathlib import Path

import pytest
import yaml

import gqaprune
from gqaprune.cli import main
from gqaprune.cli.arguments import spell_out
from gqaprune.cli.wording import explain, explain_error

from command import Run, read_scalars

THEIRS = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader
import gqaprune
from gqaprune.module import CausalLMModule

class Module(LightningModule):
    def __init__(self, folder: str, lr: float = 1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.model = gqaprune.load_model(folder)
    def training_step(self, batch, index):
        return self.model(input_ids=batch, labels=batch).loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

class Data(LightningDataModule):
    def __init__(self, size: int = 4):
        super().__init__()
        self.size = size
    def train_dataloader(self):
        return DataLoader(torch.arange(512).view(16, 32) % 200, batch_size=self.size)

class Scaled(CausalLMModule):
    def __init__(self, pretrained: str, factor: float = 1.0):
        super().__init__(pretrained)
        self.factor = factor
    def compute_loss(self, batch):
        measured = super().compute_loss(batch)
        return {**measured, "loss": self.factor * measured["loss"], "factor": torch.tensor(self.factor)}

value = 1
"""


@pytest.fixture
def theirs(run: Run, tmp_path: Path) -> str:
    """A module in the folder of the run, and beside it the settings of pruning and trainer alone."""
    name = f"theirs_{sum(map(ord, str(tmp_path)))}_{len(sys.modules)}"  # no other test has imported it
    Path(f"{name}.py").write_text(THEIRS)
    settings = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    Path("alone.yaml").write_text(yaml.safe_dump({key: settings[key] for key in ("pruning", "trainer")}))
    return name


def call(monkeypatch: pytest.MonkeyPatch, command: str, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["gqaprune", command, "--config", "alone.yaml", *arguments])
    return main()


def read_plan() -> dict[str, object]:
    (file,) = Path("lightning_logs").glob("*/checkpoint/plan.json")
    plan: dict[str, object] = json.loads(file.read_text())
    return plan


def test_their_module_and_data_are_pruned_and_trained(
    theirs: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["--model", f"{theirs}.Module", "--data", f"{theirs}.Data"]
    settings = ["--model.folder", str(tiny_folder), "--model.lr", "0.01", "--data.size", "8"]
    assert call(monkeypatch, "fit", *names, *settings) == 0
    (folder,) = Path("lightning_logs").glob("version_*")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"] == {"class_path": f"{theirs}.Module", "init_args": {"folder": str(tiny_folder), "lr": 0.01}}
    dense, pruned, recovered = json.loads((folder / "report.json").read_text())["stages"]
    assert recovered["parameters"] == pruned["parameters"] < dense["parameters"]
    assert gqaprune.load_model(folder / "checkpoint").num_parameters() == recovered["parameters"]


def test_a_configuration_may_name_them(theirs: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "model": {"class_path": f"{theirs}.Module", "init_args": {"folder": str(tiny_folder)}},
        "data": {"class_path": f"{theirs}.Data"},
        "pruning": {"rate": 0.3},
    }
    Path("theirs.yaml").write_text(yaml.safe_dump(settings))
    assert call(monkeypatch, "prune", "--config", "theirs.yaml") == 0 and read_plan()["rate"] == 0.3


def test_a_module_that_comes_from_ours_keeps_the_short_form(run: Run, theirs: str, tiny_folder: Path) -> None:
    assert run("fit", "--model", f"{theirs}.Scaled", "--model.factor", "0.5", "--export.folder", "out") == 0
    scalars = read_scalars(Path("lightning_logs/version_0"))
    assert {value for _, value in scalars["train/factor"]} == {0.5}
    assert gqaprune.load_model("out").num_parameters() < gqaprune.load_model(tiny_folder).num_parameters()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "{}.Nope"], "cannot be imported: module '{}' has no attribute 'Nope'"),
        (["--model", "nowhere.Module"], "nowhere.Module cannot be imported: No module named 'nowhere'"),
        (["--model", "{}.value"], "{}.value must be a class, got int"),
        (["--data", "{}.Module"], "{}.Module is not a LightningDataModule: name a class"),
        (["--trainer.callbacks", "Nope"], "trainer.callbacks: there is no class Nope: write its full name, such as"),
        (["--prunning.rate", "0.3"], "there is no setting --prunning.rate: did you mean --pruning.rate?"),
        (["--rate=0.3"], "there is no setting --rate: did you mean --pruning.rate?"),
        (["--pruning.rate", "lots"], "pruning.rate: must be of type float, got lots"),
        (["--trainer.precision", "8"], "trainer.precision: must be one of 64, 32, 16, transformer-engine, "),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(
    run: Run, theirs: str, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", *(argument.format(theirs) for argument in arguments)) == 1
    said = capsys.readouterr().err
    assert sentence.format(theirs) in said and len(said.splitlines()) == 1


WHOLE = """
class Whole(Module):
    def train_dataloader(self):
        return Data().train_dataloader()
"""


def test_a_module_that_brings_its_own_text_needs_no_data_module(
    theirs: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"whole_{theirs}"
    Path(f"{name}.py").write_text(THEIRS + WHOLE)
    names = ["--model", f"{name}.Whole", "--model.folder", str(tiny_folder)]
    assert call(monkeypatch, "fit", *names, "--export.folder", "out") == 0
    assert gqaprune.load_model("out").num_parameters() < gqaprune.load_model(tiny_folder).num_parameters()
    capsys.readouterr()
    assert call(monkeypatch, "fit", *names, "--model.speed", "3") == 1
    assert "error: there is no setting --model.speed;" in capsys.readouterr().err
    assert call(monkeypatch, "fit", "--model", f"{name}.Whole", "--help") == 0
    assert "--pruning.rate" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["pruen"], ["--frobnicate"]])
def test_a_command_alone_that_does_not_exist_is_said(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gqaprune", *arguments])
    assert main() == 1
    assert f"there is no {'setting' if '--' in arguments[0] else 'command'} {arguments[0]}" in capsys.readouterr().err


def test_an_error_of_the_system_names_the_file_and_not_its_number() -> None:
    with pytest.raises(OSError, match="Errno") as raised:
        open("/no/such/folder/file")  # noqa: SIM115
    said = explain_error(raised.value)
    assert said == "cannot use /no/such/folder/file: No such file or directory; choose another file or folder"


def test_a_missing_package_of_a_logger_is_the_line_that_is_kept() -> None:
    message = (
        "Does not validate against any of the Union subtypes Subtypes: [<class 'Logger'>, <class 'bool'>] Errors: - "
        "Problem with given class_path 'lightning.pytorch.loggers.WandbLogger': Requirement 'wandb>=0.12.10' not met. "
        "HINT: Try running `pip install -U 'wandb>=0.12.10'` - Expected a <class 'bool'> Given value type: <class 'N'>"
    )
    said = explain(message, ())
    assert said == (
        "WandbLogger cannot be used: Requirement 'wandb>=0.12.10' not met. HINT: Try running `pip install -U "
        "'wandb>=0.12.10'`"
    )


def test_variables_in_paths_of_configurations_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "/mine")
    typed = ["fit", "--config", "$MINE/a.yaml", "--config=$MINE/b.yaml"]
    assert spell_out(typed) == ["fit", "--config", "/mine/a.yaml", "--config=/mine/b.yaml"]


def test_an_unknown_command_is_said_with_the_nearest() -> None:
    said = explain("argument subcommand: invalid choice: 'prun' (choose from 'fit', 'prune')", ())
    assert said == "there is no command prun: did you mean prune? The commands are fit, prune"
