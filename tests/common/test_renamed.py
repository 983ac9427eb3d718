"""Every old name of a setting, an argument or a module is refused with its new one, wherever it is used."""

import copy
import importlib
import pydoc
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml

from gqaprune import PruningConfig, prune
from gqaprune.callbacks import TaylorPruning
from gqaprune.common.renamed import ARGUMENTS, ATTRIBUTES, GROUPS, MODULES, NAMES, SETTINGS
from gqaprune.datamodules import TextDataModule
from gqaprune.module import CausalLMModule
from gqaprune.planning.groups import LimitsConfig

from command import Run
from tiny import make_model, make_plain, make_tokens

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]


def describe(old: str) -> str:
    return f"{old} is now {SETTINGS[old]}"


@pytest.mark.parametrize("old", SETTINGS)
def test_old_flag_and_old_key_name_the_new_setting(old: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", f"--{old}", "[1]") == 1
    assert describe(old) in capsys.readouterr().err
    group, name = old.split(".")
    Path("old.yaml").write_text(yaml.safe_dump({group: {name: ["embedded"]}}))
    assert run("prune", "--config", "old.yaml") == 1
    assert describe(old) in capsys.readouterr().err


@pytest.mark.parametrize("old", SETTINGS)
def test_old_argument_names_the_new_setting(old: str) -> None:
    group, name = old.split(".")
    makers = {"pruning": [PruningConfig, TaylorPruning], "data": [lambda **given: TextDataModule("tiny", **given)]}
    for make in makers[group]:
        with pytest.raises(ValueError, match=re.escape(describe(old))):
            make(**{name: 1})


def test_new_settings_exist_and_old_ones_do_not(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", "--print_config") == 0
    config = yaml.safe_load(capsys.readouterr().out)

    def has(name: str) -> bool:
        place = config
        for part in name.split("."):
            if not isinstance(place, dict) or part not in place:
                return False
            place = place[part]
        return True

    assert [new for new in SETTINGS.values() if not has(new)] == []
    assert {old for old in SETTINGS if has(old)} == set(GROUPS)


@pytest.mark.parametrize("config", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_no_config_has_an_old_name(config: Path) -> None:
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    used = {f"{group}.{name}" for group in ("pruning", "data") for name in content.get(group) or ()}
    assert used & (set(SETTINGS) - set(GROUPS)) == set()
    for group, name in (old.split(".") for old in GROUPS):
        assert isinstance((content.get(group) or {}).get(name, {}), dict)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_no_page_has_an_old_name(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:pruning|data)\.\w+)\b(?!\.\w)", text))
    assert named & (set(SETTINGS) - set(GROUPS)) == set()
    assert not re.findall(rf"gqaprune\.(?:{'|'.join(MODULES)})\.\w+", text)


@pytest.mark.parametrize("old", ARGUMENTS)
def test_old_argument_of_prune_names_its_successor(old: str) -> None:
    model = make_model("llama")
    with pytest.raises(ValueError, match=re.escape(f"{old} is now CalibrationSet(")):
        prune(model, [make_tokens()], make_plain(rate=0.2), **{old.split(".")[1]: 1})


@pytest.mark.parametrize("old", MODULES)
def test_old_module_names_its_new_place(old: str) -> None:
    importlib.import_module(f"gqaprune.{MODULES[old]}")
    with pytest.raises(ModuleNotFoundError, match=f"gqaprune.{old} is now gqaprune.{MODULES[old]}"):
        importlib.import_module(f"gqaprune.{old}")


@pytest.mark.parametrize("old", NAMES)
def test_old_name_in_a_module_names_its_new_place(old: str) -> None:
    module, new = old.rpartition(".")[0], f"gqaprune.{NAMES[old]}"
    assert pydoc.locate(new) is not None
    with pytest.raises(ImportError, match=rf"gqaprune\.{module.split('.')[0]}.* is now gqaprune\.") as error:
        exec(f"from gqaprune.{module} import {old.rpartition('.')[2]}")
    if module in MODULES or module == "surgery":
        assert new in str(error.value)


@pytest.mark.parametrize("old", ATTRIBUTES)
def test_old_attribute_names_the_new_one(old: str) -> None:
    owner, name = old.split(".")
    makers: dict[str, Any] = {
        "CausalLMModule": lambda: CausalLMModule("tiny"),
        "PruningConfig": PruningConfig,
        "TaylorPruning": TaylorPruning,
        "TextDataModule": lambda: TextDataModule("tiny"),
    }
    made = makers[owner]()
    attrgetter(ATTRIBUTES[old])(made)
    with pytest.raises(AttributeError, match=re.escape(f"{old} is now {owner}.{ATTRIBUTES[old]}")):
        getattr(made, name)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        made.nothing_like_it  # noqa: B018
    assert copy.deepcopy(PruningConfig()) == PruningConfig()


def test_unknown_module_is_missed_as_ever() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'gqaprune\.nowhere'"):
        importlib.import_module("gqaprune.nowhere")


def test_group_says_which_settings_it_has() -> None:
    with pytest.raises(ValueError, match="pruning.limits has no setting 'min_group'; it has attention_layers, "):
        PruningConfig(limits={"min_group": 2})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pruning\.swaps is a group of settings \(generations, offspring\), got 3"):
        PruningConfig(swaps=3)  # type: ignore[arg-type]
    assert PruningConfig(limits={"min_groups": 2}).limits == LimitsConfig(min_groups=2)  # type: ignore[arg-type]
