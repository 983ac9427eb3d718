"""The site has a page for every setting, recipe and public name; what is not described stops its build."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import gqaprune
from gqaprune.callbacks import TaylorPruning
from gqaprune.planning.config import PruningConfig
from gqaprune.surgery.repair_config import RepairConfig

pytest.importorskip("sphinx")
ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))

from sitegen.api import find_undocumented, write_api
from sitegen.recipes import first_sentence, write_recipes
from sitegen.settings import list_settings, write_settings


def test_settings_pages_name_every_field_with_its_default(tmp_path: Path) -> None:
    write_settings(tmp_path / "settings")
    text = (tmp_path / "settings/pruning.md").read_text(encoding="utf-8")
    names = [f"pruning.{field.name}" for field in fields(PruningConfig) if not hasattr(field.default, "__post_init__")]
    names += [f"pruning.repair.{field.name}" for field in fields(RepairConfig)]
    assert len(names) > 20
    assert [name for name in names if f"`{name}`{{#" not in text] == []
    assert "\n: number; default `0.2`\n" in text
    assert '\n: list of text or text; default `["embedded"]`\n' in (tmp_path / "settings/data.md").read_text()
    assert "default `AdamW (lr: 1e-05, weight_decay: 0.01)`" in (tmp_path / "settings/model.md").read_text()


def test_settings_that_are_not_described_are_refused() -> None:
    @dataclass
    class Silent:
        """A group.

        Args:
            spoken: is described.
        """

        spoken: int = 1
        silent: int = 2

    with pytest.raises(ValueError, match=r"group\.silent is not described"):
        list(list_settings(Silent, "group."))


def test_every_configuration_has_a_page_that_its_folder_lists(tmp_path: Path) -> None:
    write_recipes(tmp_path / "recipes", ROOT / "configs")
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "recipes").iterdir()}
    for path in (ROOT / "configs").rglob("*.yaml"):
        name = path.relative_to(ROOT).as_posix()
        (page,) = [page for page, text in pages.items() if f"The file, `{name}`:" in text]
        assert f"--config {name}\n" in pages[page]
        assert any(f"<{page.removesuffix('.md')}>\n" in text for other, text in pages.items() if "all_" in other), page


def test_a_configuration_without_a_comment_or_in_an_unknown_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/bare.yaml").write_text("pruning:\n  rate: 0.1\n")
    with pytest.raises(ValueError, match=r"bare\.yaml needs a comment"):
        write_recipes(tmp_path / "pages", tmp_path / "configs")
    (tmp_path / "configs/new").mkdir()
    (tmp_path / "configs/new/one.yaml").write_text("# One.\n")
    with pytest.raises(ValueError, match="recipes of new have no heading"):
        write_recipes(tmp_path / "others", tmp_path / "configs")


def test_a_recipe_is_listed_by_the_first_sentence_of_its_comment() -> None:
    assert first_sentence("As lora.yaml, with 0.5 of it. More.") == "As `lora.yaml`, with 0.5 of it."


def test_every_public_name_has_a_page(tmp_path: Path) -> None:
    write_api(tmp_path / "api")
    for name in set(gqaprune.__all__) - {"__version__"}:
        assert f"gqaprune.{name}\n" in (tmp_path / f"api/gqaprune.{name}.rst").read_text()


def test_what_a_docstring_leaves_out_is_found() -> None:
    class Half:
        """A class.

        Args:
            known: is described.
        """

        def __init__(self, known: int, unknown: int) -> None:
            self.total = known + unknown

        def act(self) -> None:
            self.total += 1

    assert find_undocumented("Half", Half) == ["Half(unknown)", "Half.act"]
    assert find_undocumented("TaylorPruning", TaylorPruning) == []
