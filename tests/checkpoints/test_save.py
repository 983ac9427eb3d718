"""Invariant 5: save, load, same logits; with gqaprune, with plain transformers, and where gqaprune is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from gqaprune import PruningConfig, prune
from gqaprune.checkpoints.save import save
from gqaprune.commands.export import export
from gqaprune.models.architecture import find_blocks, read_geometry
from gqaprune.models.loading import load_model
from gqaprune.models.tokenizer import load_tokenizer
from gqaprune.plan import PruningPlan
from gqaprune.planning.selection import keep_everything
from gqaprune.surgery.cut import apply_plan

from cuts import EVEN, UNEVEN, drop_query_heads, get_logits, make_plan, make_pruned, read_names
from tiny import make_model, make_tokenizer, make_tokens

PLAN = keep_everything(make_model("llama"))
"""Marks a checkpoint as one of ours, which may be replaced."""


def test_uneven_counts_load_in_gqaprune_and_in_plain_transformers(variant: str, tmp_path: Path) -> None:
    model = make_pruned(variant, UNEVEN)
    assert save(model, None, tmp_path / "out") == "per-layer"
    assert torch.equal(get_logits(load_model(tmp_path / "out")), get_logits(model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(get_logits(plain), get_logits(model))
    assert read_geometry(plain.config) == read_geometry(model.config)
    base = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)  # as vLLM builds it
    with torch.no_grad():
        expected = model.model(make_tokens()).last_hidden_state
        assert torch.equal(base.eval()(make_tokens()).last_hidden_state, expected)


def test_even_counts_give_a_stock_checkpoint(variant: str, tmp_path: Path) -> None:
    model = make_pruned(variant, EVEN)
    assert save(model, None, tmp_path / "out") == "stock"
    assert not list((tmp_path / "out").glob("*.py"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(get_logits(plain), get_logits(model))
    assert torch.equal(get_logits(load_model(tmp_path / "out")), get_logits(model))


def test_llama_whose_heads_no_longer_divide_its_width_is_saved_as_a_stock_mistral(tmp_path: Path) -> None:
    model = make_model("llama", kv_heads=4, ratio=4)  # width 64, 16 heads
    apply_plan(model, make_plan(model, [[0, 1, 3]] * 3, [list(range(20))] * 3))
    assert save(model, None, tmp_path / "out") == "stock"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain).__name__ == "MistralForCausalLM"
    assert torch.equal(get_logits(plain), get_logits(model))
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["MistralForCausalLM"]


@pytest.mark.parametrize("widths", [[7, 7, 7], [3, 20, 9]], ids=["stock", "per-layer"])
def test_families_whose_attention_stays_whole_are_saved_and_loaded(widths: list[int], tmp_path: Path) -> None:
    model = make_model("olmo2", kv_heads=2, ratio=2)
    apply_plan(model, make_plan(model, [[0, 1]] * 3, [list(range(width)) for width in widths]))
    assert save(model, None, tmp_path / "out") == ("stock" if len(set(widths)) == 1 else "per-layer")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(get_logits(plain), get_logits(model))
    assert torch.equal(get_logits(load_model(tmp_path / "out")), get_logits(model))


WITHOUT_2_AND_13 = [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


def test_one_query_head_less_in_every_group_gives_a_stock_checkpoint(variant: str, tmp_path: Path) -> None:
    model = drop_query_heads(variant, [WITHOUT_2_AND_13] * 3)
    # 12 heads do not divide a width of 56: no stock Llama with biases, no stock Gemma.
    is_stock = variant not in ("llama-biases", "gemma2", "gemma3")
    assert save(model, None, tmp_path / "out") == ("stock" if is_stock else "per-layer")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=not is_stock)
    assert torch.equal(get_logits(plain), get_logits(model))
    assert torch.equal(get_logits(load_model(tmp_path / "out")), get_logits(model))
    assert read_geometry(plain.config).ratios == (6, 6, 6)
    assert read_geometry(plain.config).kv_heads == (2, 2, 2)


def test_ratios_that_differ_by_layer_load_and_generate_in_plain_transformers(variant: str, tmp_path: Path) -> None:
    model = drop_query_heads(variant, [WITHOUT_2_AND_13, None, [6, 7]])
    assert save(model, None, tmp_path / "out") == "per-layer"
    assert torch.equal(get_logits(load_model(tmp_path / "out")), get_logits(model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(get_logits(plain), get_logits(model))
    assert read_geometry(plain.config).ratios == (6, 7, 1)
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(make_tokens(1), use_cache=False, **options)
    assert torch.equal(plain.generate(make_tokens(1), use_cache=True, **options), expected)


def test_llama_with_biases_whose_heads_no_longer_divide_its_width_is_saved_per_layer(tmp_path: Path) -> None:
    model = make_model("llama-biases", kv_heads=4, ratio=4)
    apply_plan(model, make_plan(model, [[0, 1, 3]] * 3, [list(range(20))] * 3))
    assert save(model, None, tmp_path / "out") == "per-layer"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(get_logits(plain), get_logits(model))


def test_per_layer_checkpoint_loads_where_gqaprune_is_not_installed(tmp_path: Path) -> None:
    model = make_pruned("qwen2", UNEVEN, ratio=7)
    save(model, make_tokenizer(), tmp_path / "out")
    script = (
        "import sys; sys.modules['gqaprune'] = None\n"  # any import of it fails
        "import torch\n"
        "from safetensors.torch import save_file\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(tmp_path / 'out')!r}\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))\n"
        "logits = model(ids).logits.detach()\n"
        "text = model.generate(ids[:1], max_new_tokens=8, do_sample=False)\n"
        "same = model.generate(ids[:1], max_new_tokens=8, do_sample=False, use_cache=False)\n"
        "assert torch.equal(text, same)\n"
        "assert AutoTokenizer.from_pretrained(folder)('abc')['input_ids']\n"
        f"save_file({{'logits': logits}}, {str(tmp_path / 'logits.safetensors')!r})\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=tmp_path)
    torch.testing.assert_close(
        load_file(tmp_path / "logits.safetensors")["logits"], get_logits(model), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("kept", [EVEN, UNEVEN], ids=["stock", "per-layer"])
def test_head_dim_that_followed_from_the_number_of_heads_becomes_explicit(
    kept: tuple[list[list[int]], list[list[int]]], tmp_path: Path
) -> None:
    model = make_model("qwen2", kv_heads=3, ratio=2, head_dim=None)
    apply_plan(model, make_plan(model, *kept))
    save(model, None, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(get_logits(plain), get_logits(model))
    assert plain.config.head_dim == 4


def test_eager_attention_and_bfloat16_reach_every_layer(tmp_path: Path) -> None:
    save(make_pruned("mistral-sliding", UNEVEN), None, tmp_path / "out")
    model = load_model(tmp_path / "out", dtype="bfloat16", attn_implementation="eager")
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"eager"}
    assert model.dtype == torch.bfloat16
    model.set_attn_implementation("sdpa")
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"sdpa"}


def test_plan_reapplied_to_the_dense_model_gives_the_saved_weights(tmp_path: Path) -> None:
    dense = make_model("qwen3", kv_heads=3, ratio=2)
    plan = make_plan(dense, *UNEVEN)
    save(make_pruned("qwen3", UNEVEN), None, tmp_path / "out", plan)
    apply_plan(dense, PruningPlan.load(tmp_path / "out/plan.json"))
    saved = load_file(tmp_path / "out/model.safetensors")
    assert saved and all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in saved.items())


def test_loaded_pruned_model_can_be_pruned_and_saved_again(tmp_path: Path) -> None:
    save(make_pruned("llama", UNEVEN), None, tmp_path / "first")
    model = load_model(tmp_path / "first")
    apply_plan(model, make_plan(model, [[0], [1, 2], [0]], [[0], [4], [1, 2]]))
    save(model, None, tmp_path / "second")
    assert torch.equal(get_logits(load_model(tmp_path / "second")), get_logits(model))


def test_saving_replaces_an_older_checkpoint_and_leaves_nothing_else(tmp_path: Path) -> None:
    save(make_pruned("llama", UNEVEN), make_tokenizer(), tmp_path / "out", PLAN)
    even = make_pruned("llama", EVEN)
    save(even, make_tokenizer(), tmp_path / "out", PLAN)
    assert not list((tmp_path / "out").glob("*.py"))
    assert torch.equal(get_logits(load_model(tmp_path / "out")), get_logits(even))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_save_that_breaks_off_keeps_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = make_pruned("llama", UNEVEN), make_pruned("llama", EVEN)
    save(old, None, tmp_path / "out", PLAN)

    def break_off(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", break_off)
    with pytest.raises(KeyboardInterrupt):
        save(new, make_tokenizer(), tmp_path / "out", PLAN)
    assert torch.equal(get_logits(load_model(tmp_path / "out")), get_logits(old))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for folder in (tmp_path / "out", tmp_path / "out/below"):
        with pytest.raises(ValueError, match="out is a file; choose another folder"):
            save(make_pruned("llama", EVEN), None, folder)
    assert (tmp_path / "out").read_text() == "mine"


def test_model_that_is_not_ours_is_not_overwritten(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="from an earlier run .no plan.json beside a model.; choose an empty or new"):
        save(make_pruned("llama", EVEN), None, tmp_path, PLAN)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_folder_of_a_run_is_not_overwritten_for_the_plan_in_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    PLAN.save(tmp_path / "run/plan.json")
    (tmp_path / "run/report.html").touch()
    with pytest.raises(ValueError, match=r"no plan\.json beside a model"):
        save(make_model("llama"), None, tmp_path / "run", PLAN)
    assert read_names(tmp_path / "run") == {"plan.json", "report.html"}


def test_link_is_followed_to_the_folder_that_is_replaced(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(f"elsewhere/{name}")
    save(make_model("llama"), None, tmp_path / "elsewhere/old", PLAN)
    for name in ("old", "new"):  # there, and not there yet
        save(make_model("llama", seed=1), None, tmp_path / name, PLAN)
        assert (tmp_path / name).is_symlink()
        assert torch.equal(get_logits(load_model(tmp_path / name)), get_logits(make_model("llama", seed=1)))
    assert read_names(tmp_path) == {"old", "new", "elsewhere"} and read_names(tmp_path / "elsewhere") == {"old", "new"}


def test_what_cannot_be_replaced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the working directory, which cannot be replaced; choose a folder in it"):
        save(make_model("llama"), None, ".")
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    with pytest.raises(ValueError, match="to volume: it is a mount point"):
        save(make_model("llama"), None, "volume")


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".out.gqaprune.tmp").mkdir()
    (tmp_path / ".out.gqaprune.tmp/thesis.tex").touch()
    (tmp_path / ".out.gqaprune.lock").touch()
    save(make_model("llama"), None, tmp_path / "out")
    assert read_names(tmp_path) == {"out"}


@pytest.mark.parametrize("size", ["5G", "much"])
def test_shard_size_without_a_meaning_is_refused(size: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"max_shard_size must be .*, got '{size}'; try 5GB"):
        save(make_model("llama"), None, tmp_path / "out", max_shard_size=size)
    assert not list(tmp_path.iterdir())


def test_folder_with_other_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="has files that are not from an earlier run"):
        save(make_pruned("llama", EVEN), None, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_padded_checkpoints_are_stock_ones_with_the_same_logits(variant: str, tmp_path: Path) -> None:
    model = make_pruned(variant, UNEVEN)
    assert save(model, make_tokenizer(), tmp_path / "out", format="padded") == "padded"
    assert "modeling_pruned.py" not in read_names(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(plain).__module__.startswith("transformers.models") and not plain.config.is_heterogeneous
    for loaded in (plain, load_model(tmp_path / "out")):
        torch.testing.assert_close(get_logits(loaded), get_logits(model), atol=1e-4, rtol=0)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(plain.generate(make_tokens(1), **options), model.generate(make_tokens(1), **options))


def test_gguf_checkpoints_are_loaded_from_their_folder(tmp_path: Path) -> None:
    model = make_pruned("llama", UNEVEN)
    tokenizer = make_tokenizer([("e", "d"), ("r", "u")])
    assert save(model, tokenizer, tmp_path / "out", PLAN, format="gguf-f16") == "gguf-f16"
    assert read_names(tmp_path / "out") == {"model-f16.gguf", "plan.json", "README.md"}
    torch.testing.assert_close(get_logits(load_model(tmp_path / "out")), get_logits(model), atol=0.02, rtol=0.02)
    assert load_tokenizer(tmp_path / "out")("pruned")["input_ids"] == tokenizer("pruned")["input_ids"]
    with pytest.raises(ValueError, match="a GGUF file needs a tokenizer, got None"):
        save(model, None, tmp_path / "other", format="gguf-f16")
    assert read_names(tmp_path) == {"out"}
    (tmp_path / "out/second.gguf").touch()
    with pytest.raises(ValueError, match=r"several GGUF files \(model-f16.gguf, second.gguf\): use one of them"):
        load_model(tmp_path / "out")


def test_tokenizer_that_a_gguf_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the tokenizer cannot be read from a GGUF file .*; use padded"):
        save(make_model("llama"), make_tokenizer(), tmp_path / "out", format="gguf-f16")  # no merges at all
    assert not list(tmp_path.iterdir())


def test_formats_that_cannot_hold_a_model_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    uneven = make_model("llama", layers=6, kv_heads=3, ratio=2)
    channels = [list(range(20))] * 6
    apply_plan(uneven, make_plan(uneven, [[0, 1, 2]] * 6, [*channels[:1], [1], [2], *channels[:2], [4]]))
    biased = make_model("llama-biases", kv_heads=4, ratio=4)
    apply_plan(biased, make_plan(biased, [[0, 1, 3]] * 3, [list(range(20))] * 3))
    for model, format, reason in (
        (
            uneven,
            "stock",
            "layers 1-2, 5 differ from 6 query heads, 3 KV heads and 20 channels; use per-layer",
        ),
        (
            biased,
            "stock",
            "no stock llama can have 12 query heads with a hidden size of 64; use per-layer",
        ),
        (uneven, "pickle", "format must be one of auto, stock, per-layer, .*, got 'pickle'"),
    ):
        with pytest.raises(ValueError, match=reason):
            save(model, make_tokenizer(), tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


def test_large_weights_are_split_and_loaded(tmp_path: Path) -> None:
    model = make_pruned("llama", UNEVEN)
    save(model, None, tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert torch.equal(get_logits(load_model(tmp_path / "out")), get_logits(model))


@pytest.mark.parametrize("kept", [EVEN, UNEVEN], ids=["stock", "per-layer"])
def test_saving_what_was_loaded_gives_the_same_folder(
    kept: tuple[list[list[int]], list[list[int]]], variant: str, tmp_path: Path
) -> None:
    save(make_pruned(variant, kept), None, tmp_path / "first")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "first", trust_remote_code=True)
    plain.save_pretrained(tmp_path / "plain")
    save(load_model(tmp_path / "first"), None, tmp_path / "own")
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    for folder in ("plain", "own"):
        again = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        assert again.keys() == first.keys()
        for name in first:
            assert again[name] == first[name], f"{folder} {name}"


@pytest.mark.parametrize("format", ["stock", "per-layer", "padded"])
def test_weights_in_8_bits_are_smaller_and_give_nearly_the_same_logits(format: str, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model = make_pruned("llama", EVEN if format == "stock" else UNEVEN)
    save(model, make_tokenizer(), tmp_path / "plain", format=format)
    assert save(model, make_tokenizer(), tmp_path / "int8", PLAN, format=format, quantization="int8") == format
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "int8")]
    assert sizes[1] < 0.9 * sizes[0]  # embeddings, most of this tiny model, stay as they are
    assert read_names(tmp_path / "int8") - read_names(tmp_path / "plain") == {"plan.json", "README.md"}
    expected = get_logits(model)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", trust_remote_code=format == "per-layer")
    assert [type(plain).__name__] == json.loads((tmp_path / "plain/config.json").read_text())["architectures"]
    for loaded in (plain, load_model(tmp_path / "int8")):
        error = (get_logits(loaded) - expected).norm() / expected.norm()
        assert 1e-4 < error < 0.1
    with pytest.raises(ValueError, match="layer 0 attention q_proj is .*not a plain floating-point linear layer"):
        find_blocks(load_model(tmp_path / "int8"))
    with pytest.raises(ValueError, match="not a plain floating-point linear layer: load the model unquantised"):
        prune(load_model(tmp_path / "int8"), [make_tokens()], PruningConfig(rate=0.1))
    for other in ("auto", "padded"):
        with pytest.raises(ValueError, match="not a plain floating-point linear layer"):
            export(str(tmp_path / "int8"), str(tmp_path / "out"), other)
    with pytest.raises(ValueError, match="format gguf-f16 cannot be combined with quantization int8"):
        save(model, make_tokenizer(), tmp_path / "out", format="gguf-f16", quantization="int8")


def test_quantisation_without_its_package_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"quantization int8 needs torchao: pip install 'gqaprune\[int8\]'"):
        save(make_pruned("llama", EVEN), None, tmp_path / "out", quantization="int8")
    with pytest.raises(ValueError, match="quantization must be one of int8, got 'int3'"):
        save(make_pruned("llama", EVEN), None, tmp_path / "out", quantization="int3")
    assert not list(tmp_path.iterdir())


UNSAVABLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "attentions under sdpa": ("config", {"_output_attentions": True}, "set it to 'eager' instead; correct its config"),
    "layer types": ("config", {"layer_types": ["none"] * 3}, "entries must be in .*; correct its config.json"),
    "rope": ("config", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor.*; correct its config"),
    "an object": ("config", {"own": object()}, "object is not JSON serializable; correct its config.json"),
    "beams": ("config", {"num_beams": 4}, "generation parameters are set in the model config.*; correct its config"),
    "sampling": ("generation_config", {"temperature": 0.5}, "temperature.*; correct its generation_config.json"),
    "bad length": ("generation_config", {"max_new_tokens": -1}, "greater than 0.*; correct its generation_config.json"),
}


@pytest.mark.parametrize("name", list(UNSAVABLE))
def test_what_transformers_refuses_to_save_is_said_before_weights_are_written(name: str, tmp_path: Path) -> None:
    part, values, sentence = UNSAVABLE[name]
    model = make_model()
    for key, value in values.items():
        setattr(getattr(model, part), key, value)
    with pytest.raises(ValueError, match=f"transformers refuses to save the model: .*{sentence}"):
        save(model, make_tokenizer(), tmp_path / "out", PLAN)
    assert not list(tmp_path.iterdir())


GENERATION: dict[str, dict[str, Any]] = {
    "wishes": {"return_dict_in_generate": True, "num_beams": 4, "stop_strings": ["x"], "repetition_penalty": 1.5},
    "what transformers finds invalid": {"temperature": 0.6, "top_p": 0.9, "do_sample": False},
    "a cache": {"cache_implementation": "static", "max_time": 0.1},
}


@pytest.mark.parametrize("name", list(GENERATION))
@pytest.mark.parametrize("kept", [EVEN, UNEVEN], ids=["stock", "per-layer"])
def test_a_sources_generation_config_is_saved_as_it_is(name: str, kept: Any, tmp_path: Path) -> None:
    save(make_model("llama", kv_heads=3, ratio=2), None, tmp_path / "dense")
    (tmp_path / "dense/generation_config.json").write_text(json.dumps(GENERATION[name]))
    model = load_model(tmp_path / "dense")
    apply_plan(model, make_plan(model, *kept))
    save(model, None, tmp_path / "out")
    saved = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert GENERATION[name].items() <= saved.items()
