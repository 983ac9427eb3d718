"""A source loads with its own settings, the same in each way of loading."""

from pathlib import Path

import pytest
import torch

from gqaprune.placement.model_source import ModelSource


@pytest.mark.parametrize("is_offloaded", [False, True], ids=["whole", "on disk"])
def test_dtype_and_attention_kernel_are_those_of_the_source(
    tiny_folder: Path, tmp_path: Path, is_offloaded: bool
) -> None:
    source = ModelSource(str(tiny_folder), "bfloat16", "eager")
    model = source.load_offloaded(tmp_path / "layers") if is_offloaded else source.load()
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    default = ModelSource(str(tiny_folder)).load()
    assert default.dtype == torch.float32 and default.config._attn_implementation == "sdpa"


def test_folders_of_safetensors_can_be_read_by_layer_and_gguf_files_cannot(tiny_folder: Path) -> None:
    assert ModelSource(str(tiny_folder)).can_be_read_by_layer
    assert not ModelSource("smollm2-135m").can_be_read_by_layer
