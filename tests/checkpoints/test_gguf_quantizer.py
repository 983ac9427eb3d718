"""4 to 6 bits: llama.cpp reads what its own quantiser made of a model, and what falls back to other types is said."""

import sys
from pathlib import Path

import gguf
import pytest
import torch
from transformers import PreTrainedModel

from gqaprune.checkpoints import gguf_quantizer
from gqaprune.checkpoints.formats import choose_format
from gqaprune.checkpoints.gguf_quantizer import describe_fallbacks
from gqaprune.checkpoints.gguf_writer import write_gguf
from gqaprune.checkpoints.save import save
from gqaprune.commands.export import export
from gqaprune.common.console import console
from gqaprune.common.safe_text import for_markdown
from gqaprune.models.architecture import read_geometry
from gqaprune.models.loading import load_model
from gqaprune.surgery.cut import apply_plan

from cuts import get_logits, make_plan, read_names
from tiny import make_model, make_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from formats import ask_llama_cpp

pytest.importorskip("xllamacpp")
TOKENIZER = make_tokenizer([("e", "d"), ("r", "u")])


def make_wide(channels: int = 256, layers: int = 3) -> PreTrainedModel:
    """A model whose rows are whole blocks of 256 values, calm enough that rounding does not upset it."""
    model = make_model(kv_heads=4, ratio=16, head_dim=8, channels=channels, layers=layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3 if parameter.ndim > 1 else 1.0)
    return model


def write(model: PreTrainedModel, folder: Path, kind: str = "q4_k_m") -> Path:
    save(model, TOKENIZER, folder, format=f"gguf-{kind}")
    return folder / f"model-{kind}.gguf"


def read_types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `llama-quantize` where the wheel is not: it tells its arguments, and copies what it is given."""
    monkeypatch.setattr(gguf_quantizer, "_load_rounding", lambda: None)
    program = tmp_path / "bin/llama-quantize"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$3" > "$0.told"\ncp "$1" "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return program


@pytest.mark.parametrize(
    ("kind", "most", "rounding"), [("q4_k_m", "Q4_K", 0.4), ("q5_k_m", "Q5_K", 0.2), ("q6_k", "Q6_K", 0.1)]
)
def test_matrices_have_the_bits_asked_for_and_the_most_sensitive_ones_6(
    kind: str, most: str, rounding: float, tmp_path: Path
) -> None:
    model = make_wide(layers=8)
    types = read_types(write(model, tmp_path / "out", kind))
    assert types["token_embd.weight"] == most and types["output.weight"] == "Q6_K"
    assert {types[f"blk.{layer}.ffn_up.weight"] for layer in range(8)} == {most}
    for name in ("ffn_down", "attn_v"):
        more = {layer for layer in range(8) if types[f"blk.{layer}.{name}.weight"] == "Q6_K"}
        assert more == (set(range(8)) if kind == "q6_k" else {0, 3, 6, 7})
    expected = get_logits(model)
    error = (get_logits(load_model(tmp_path / "out")) - expected).norm() / expected.norm()
    assert rounding / 4 < error < rounding
    assert describe_fallbacks(tmp_path / "out") == ""


def test_a_head_that_is_the_embedding_has_a_heads_bits(tmp_path: Path) -> None:
    model = make_wide()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    types = read_types(write(model, tmp_path / "out"))
    assert types["token_embd.weight"] == "Q6_K" and "output.weight" not in types


def test_llama_cpp_computes_what_the_file_says(tmp_path: Path) -> None:
    model = make_wide()
    model.resize_token_embeddings(len(TOKENIZER))
    file = write(model, tmp_path / "out", "q6_k")
    prompts = ["Pruned: 1234 heads", "x" * 40 + " ran the editor"]
    for prompt, (count, likeliest) in zip(prompts, ask_llama_cpp(file, prompts), strict=True):
        ids = TOKENIZER(prompt, return_tensors="pt")["input_ids"]
        assert count == ids.shape[1] and len(likeliest) == 20
        expected = load_model(file)(ids).logits[0, -1].log_softmax(-1)
        for token, log_probability in likeliest:
            assert log_probability == pytest.approx(expected[token].item(), abs=0.3)


def test_every_thread_rounds_rows_of_its_own(tmp_path: Path) -> None:
    model = make_wide(channels=96)  # 96 rows on 7 threads
    files = []
    for threads in (1, 7):
        torch.set_num_threads(threads)
        files.append(write(model, tmp_path / str(threads)).read_bytes())
    torch.set_num_threads(1)
    assert files[0] == files[1]


def test_what_falls_back_to_larger_types_is_said_with_the_setting_that_avoids_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_wide(channels=300)
    plan = make_plan(model, [[0, 1, 2, 3]] * 3, [list(range(256)), list(range(257)), list(range(300))])
    apply_plan(model, plan)
    save(model, TOKENIZER, tmp_path / "pruned", plan)
    console.quiet = False
    export(str(tmp_path / "pruned"), str(tmp_path / "out"), "gguf-q4_k_m")
    said = " ".join(capsys.readouterr().out.split())
    remark = describe_fallbacks(tmp_path / "out")
    assert "23 matrices are stored in larger types (" in remark
    assert remark.endswith(
        " are not multiples of 256 values: set pruning.limits.channel_multiple to 256 to avoid it in MLPs."
    )
    assert remark in said and for_markdown(remark) in (tmp_path / "out/README.md").read_text().splitlines()
    assert read_geometry(load_model(tmp_path / "out").config) == plan.pruned_geometry
    types = read_types(tmp_path / "out/model-q4_k_m.gguf")
    assert {types[f"blk.{layer}.ffn_down.weight"] for layer in (1, 2)} == {"Q5_0", "Q8_0"}


def test_models_of_a_narrow_hidden_size_fall_back_whatever_is_set(tmp_path: Path) -> None:
    write(make_model("llama", kv_heads=2, ratio=4, channels=40), tmp_path / "out", "q5_k_m")  # 32 wide
    remark = describe_fallbacks(tmp_path / "out")
    assert remark.startswith("23 of 23 matrices") and "(20 in q5_1, 3 in q8_0)" in remark
    assert remark.endswith("most of them have rows of 32 values, this model's hidden size.")


def test_without_a_quantiser_the_format_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_quantizer, "_load_rounding", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"nor llama-quantize is installed: pip install 'gqaprune\[llama"):
        choose_format(make_model().config, "gguf-q4_k_m")
    assert choose_format(make_model().config, "gguf-q8_0") == "gguf-q8_0"


def test_a_wheel_whose_library_hides_its_functions_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert gguf_quantizer._load_rounding() is None


def test_llama_quantize_is_used_where_the_wheel_is_not(program: Path, tmp_path: Path) -> None:
    assert write(make_wide(), tmp_path / "out", "q5_k_m").exists()
    assert program.with_name("llama-quantize.told").read_text() == "Q5_K_M\n"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('touch "$2"; echo "disk full" >&2; exit 1', r"llama-quantize could not write q4_k_m \(disk full\)"),
        ("exit 139", r"could not write q4_k_m \(no message\); use gguf-q8_0"),
        ('cp "$0.wider" "$2"', r"quantiser changed llama\.feed_forward_length in the file; use gguf-q8_0"),
        ("LC_ALL=C sed s/attn_q.weight/attn_x.weight/ $1 > $2", r"changed the shape of blk\.0\.attn_q\.weight; use"),
        ('cp "$0.other" "$2"', r"changed token_embd\.weight by more than rounding; use gguf-q8_0"),
    ],
)
def test_a_quantiser_that_fails_or_writes_another_model_leaves_the_old_checkpoint(
    script: str, reason: str, program: Path, tmp_path: Path
) -> None:
    model = make_model(channels=32)
    for name, unlike in (("wider", make_model(channels=64)), ("other", make_model(channels=32, seed=1))):
        write_gguf(program.with_suffix(f".{name}"), unlike.config, unlike.state_dict(), TOKENIZER)
    plan = make_plan(model, [[0, 1]] * 3, [list(range(32))] * 3)
    save(model, TOKENIZER, tmp_path / "out", plan, format="stock")
    before = read_names(tmp_path / "out")
    program.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(ValueError, match=reason):
        save(model, TOKENIZER, tmp_path / "out", plan, format="gguf-q4_k_m")
    assert read_names(tmp_path / "out") == before


def test_the_file_it_was_made_from_does_not_stay(tmp_path: Path) -> None:
    write(make_wide(), tmp_path / "out", "q6_k")
    assert read_names(tmp_path / "out") == {"model-q6_k.gguf"}
    assert read_names(tmp_path) == {"out"}
