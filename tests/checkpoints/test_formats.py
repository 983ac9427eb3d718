"""Formats are entries: one more is all that a new one needs, wherever a format is chosen, written, told or refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from gqaprune import save
from gqaprune.checkpoints.base import Content, Format
from gqaprune.checkpoints.formats import FORMATS, check_written_by_layer, choose_format, describe_formats
from gqaprune.checkpoints.padding import find_padded_shapes
from gqaprune.checkpoints.save import measure_weights
from gqaprune.cli import main
from gqaprune.common.console import console
from gqaprune.geometry import Geometry
from gqaprune.models.architecture import read_geometry
from gqaprune.models.gguf_file import read_header
from gqaprune.models.loading import load_model
from gqaprune.placement.layer_store import Placement
from gqaprune.planning.selection import keep_everything

from command import Run
from cuts import UNEVEN, make_pruned, narrow, read_names
from tiny import make_model, make_tokenizer

ROOT = Path(__file__).parent.parent.parent
PLAN = keep_everything(make_model("llama"))


def write_names(content: Content, folder: Path) -> None:
    (folder / "all.names").write_text("\n".join(content.state_dict))


def refuse_qwen(config: object) -> None:
    if getattr(config, "model_type", "") == "qwen2":
        raise ValueError("names of Qwen2 are secret; use padded")


NAMES = Format(
    write_names,
    summary="names of tensors",
    about="Names alone.",
    loading="`cat {file_word}` shows them.",
    check=refuse_qwen,
    file="*.names",
    takes_quantization=False,
)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format that is made up, entered as any other."""
    monkeypatch.setitem(FORMATS, "names", NAMES)  # type: ignore[arg-type]


@pytest.mark.usefixtures("names")
def test_entered_format_is_saved_told_on_its_card_and_replaced(tmp_path: Path) -> None:
    model = make_pruned("llama", UNEVEN)
    for _ in range(2):  # the second time over a checkpoint that is known by its file alone
        assert save(model, None, tmp_path / "out", PLAN, format="names") == "names"
    assert read_names(tmp_path / "out") == {"all.names", "plan.json", "README.md"}
    assert "\nNames alone.\n\n`cat out/all.names` shows them.\n" in (tmp_path / "out/README.md").read_text()
    assert measure_weights(tmp_path / "out") == len("\n".join(model.state_dict()))


@pytest.mark.usefixtures("names")
def test_entered_format_refuses_what_its_flags_say(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match="names of Qwen2 are secret; use padded"):
        save(make_model("qwen2"), None, tmp_path / "out", format="names")
    with pytest.raises(ValueError, match="format names cannot be combined with quantization int8"):
        save(make_model("llama"), None, tmp_path / "out", format="names", quantization="int8")
    with pytest.raises(
        ValueError, match="format names needs the whole model .* set format to auto, stock or per-layer, "
    ):
        check_written_by_layer("names", None, Placement.DISK)
    with pytest.raises(ValueError, match="one of auto, stock, per-layer, .*, names, got 'x'"):
        choose_format(make_model("llama").config, "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("names")
def test_commands_write_an_entered_format_and_list_it(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console.quiet = False
    assert run("fit", "--export.format", "names", "--export.folder", "trained") == 0
    assert read_names(Path("trained")) == {"all.names", "plan.json", "README.md"}
    assert "Names alone." in Path("trained/README.md").read_text()
    assert "names format\n" in capsys.readouterr().out
    exported = ["export", "--model", str(tiny_folder), "--folder", "exported", "--format", "names"]
    monkeypatch.setattr("sys.argv", ["gqaprune", *exported])
    assert main() == 0
    assert read_names(Path("exported")) == {"all.names"}
    assert "names format" in capsys.readouterr().out
    for arguments in (["export", "--help"], ["fit", "--help"]):
        monkeypatch.setattr("sys.argv", ["gqaprune", *arguments])
        assert main() == 0
        assert "`names` (names of tensors); `auto` is" in " ".join(capsys.readouterr().out.split())


def test_format_with_remote_code_or_equal_counts_is_handled_by_its_flags(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console.quiet = False
    remote = Format(write_names, "a", "b", needs_remote_code=True, goes_by_layer=True)
    monkeypatch.setitem(FORMATS, "remote", remote)  # type: ignore[arg-type]
    monkeypatch.setitem(FORMATS, "equal", Format(write_names, "a", "b", needs_equal_counts=True))  # type: ignore[arg-type]
    assert run("prune", "--export.format", "remote", "--export.folder", "out", "--pruning.offload", "true") == 1
    assert "criterion" in capsys.readouterr().err  # not the format
    assert run("prune", "--export.format", "remote", "--export.folder", "out") == 0
    assert "remote format (load with trust_remote_code=True)" in capsys.readouterr().out
    assert run("prune", "--export.format", "equal") == 1
    assert "needs equal counts in every layer" in capsys.readouterr().err


def test_auto_is_the_first_automatic_format_that_can_hold_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    uneven = make_pruned("llama", UNEVEN).config
    assert choose_format(uneven, "auto") == "per-layer"
    fewer = {name: entry for name, entry in FORMATS.items() if name != "per-layer"}
    monkeypatch.setattr("gqaprune.checkpoints.formats.FORMATS", fewer)
    assert choose_format(uneven, "auto") == "padded"
    assert choose_format(make_model("llama").config, "auto") == "stock"
    assert describe_formats().endswith("`auto` is the first of `stock` or `padded` that can store the model.")


@pytest.mark.parametrize("format", list(FORMATS))
def test_shapes_are_those_of_the_files(format: str, tmp_path: Path) -> None:
    models = {"stock": make_model("llama"), "nemotron-nas": narrow(make_model("llama", head_dim=None, channels=600))}
    model = models.get(format) or make_pruned("llama", UNEVEN)
    save(model, make_tokenizer([("e", "d"), ("r", "u")]), tmp_path / "out", format=format)
    written = read_written_shapes(tmp_path / "out")
    assert FORMATS[format].read_shapes(model.config) == written
    assert (written == read_geometry(model.config)) == (format in ("stock", "per-layer", "mlx", "gguf-f16"))
    assert (written == find_padded_shapes(model.config)) == (format in ("stock", "padded", "gguf-f16-padded"))


def read_written_shapes(folder: Path) -> Geometry:
    """The shapes of the tensors in a GGUF file; of a config's where that is all there is to say."""
    geometry = read_geometry(load_model(folder).config)
    for file in folder.glob("*.gguf"):
        shapes = {name: stored.shape for name, stored in read_header(file).tensors.items()}
        columns = {
            part: [shapes[f"blk.{layer}.{part}.weight"][1] for layer in range(geometry.num_layers)]
            for part in ("attn_output", "ffn_down")
        }
        heads = tuple(width // geometry.head_dim for width in columns["attn_output"])
        geometry = replace(geometry, query_heads=heads, channels=tuple(columns["ffn_down"]))
    return geometry


def test_every_format_has_its_row_in_the_documentation() -> None:
    page = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert [name for name in FORMATS if f"`{name}`" not in " ".join(rows)] == []
