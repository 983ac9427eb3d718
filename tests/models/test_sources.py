"""Where models are looked for, and a sentence for what is none."""

from pathlib import Path

import pytest

from gqaprune.models.loading import load_model
from gqaprune.models.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("/no/such/model", "the folder does not exist"),
        ("./here", "the folder does not exist"),
        ("gone.gguf", "no GGUF file at gone.gguf"),
        ("nobody/nothing", "from 'nobody/nothing', which is no folder here: "),
        ("lama", "from 'lama', which is no folder here: "),
    ],
)
def test_missing_model_is_said_in_a_sentence(source: str, sentence: str) -> None:
    for load_it in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=sentence):
            load_it(source)


def test_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Hugging Face checkpoint: it has no config.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no-such-type"}', '{"hidden_size": 3}'])
def test_broken_config_is_said_in_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="cannot load a model from") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
