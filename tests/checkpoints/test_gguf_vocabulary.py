"""Tokenizers in GGUF files: text is read from there as before."""

from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from gqaprune.checkpoints.gguf_vocabulary import _SPLITS as SPLITS
from gqaprune.checkpoints.gguf_writer import write_gguf
from gqaprune.checkpoints.save import save
from gqaprune.models.loading import load
from gqaprune.models.tokenizer import load_tokenizer

from tiny import make_model, make_tokenizer


@pytest.mark.parametrize("split", ["plain", "digits", "llama3", "qwen2"])
def test_byte_level_tokenizers_read_text_as_before(split: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer([("e", "d"), ("1", "2"), ("12", "3")])
    patterns = dict(zip(("llama3", "qwen2"), SPLITS, strict=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in ("plain", "digits"))
    first = {"plain": [], "digits": [pre_tokenizers.Digits(individual_digits=True)]}.get(split)
    if first is None:
        first = [pre_tokenizers.Split(Regex(patterns[split]), behavior="isolated")]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level]) if first else byte_level
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model = make_model("llama")
    model.resize_token_embeddings(300)
    if split == "digits":  # which transformers' reader does not know
        with pytest.raises(ValueError, match="the tokenizer in the GGUF file gives different tokens"):
            write_gguf(tmp_path / "model.gguf", model.config, model.state_dict(), tokenizer, is_padded=True)
    write_gguf(tmp_path / "model.gguf", model.config, model.state_dict(), tokenizer, is_padded=split != "digits")
    readers = [load_tokenizer(tmp_path)]
    if split != "digits":
        readers.append(AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf"))
    for written in readers:
        for text in ("Pruned: 1234 heads, it's</s> 漢字 naïve", "  def f(x):\n\n\treturn 'x'  "):
            assert written(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert written.chat_template == tokenizer.chat_template
        assert (written.bos_token, written.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize("split", ["gpt-2", "llama-bpe"])
def test_a_file_with_an_embedding_for_each_token_and_no_more_is_loaded_with_its_own_tokens(
    split: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer([("e", "d"), ("r", "u")])
    if split == "llama-bpe":
        pattern = next(pattern for pattern, name in SPLITS.items() if name == split)
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    model = make_model()
    assert model.config.vocab_size == len(tokenizer)
    save(model, tokenizer, tmp_path, format="gguf-f16")
    _, loaded = load(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    text = "It ran.<|endoftext|></s>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
