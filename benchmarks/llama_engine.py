"""llama.cpp as the library in the wheel `xllamacpp`, by its C interface: log-likelihoods of windows, and seconds.

Its server answers with no log-probabilities of a prompt, and nothing in the wheel measures perplexity. Structures whose
fields are not needed here are passed on as they come, with room for more than any version has.
"""

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xllamacpp
from torch import Tensor

from gqaprune.commands.speed import read_clock

_WORDS = 128


class _ModelParameters(ctypes.Structure):
    _fields_ = (("unread", ctypes.c_uint64 * _WORDS),)


class _ContextParameters(ctypes.Structure):
    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("unread", ctypes.c_uint64 * _WORDS),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_log = _Log(lambda level, text, data: None)


def _load() -> ctypes.CDLL:
    library, pointer = ctypes.CDLL(xllamacpp.xllamacpp.__file__), ctypes.c_void_p
    for name, result, arguments in (
        ("llama_log_set", None, [_Log, pointer]),
        ("llama_model_default_params", _ModelParameters, []),
        ("llama_context_default_params", _ContextParameters, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _ModelParameters]),
        ("llama_init_from_model", pointer, [pointer, _ContextParameters]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", ctypes.c_int32, [pointer]),
        ("llama_set_n_threads", None, [pointer, ctypes.c_int32, ctypes.c_int32]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_decode", ctypes.c_int32, [pointer, _Batch]),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [pointer]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_log, None)
    return library


class Seconds(NamedTuple):
    """What a model took for a prompt and for the tokens after it."""

    prompt: float
    decode: float


class LlamaCpp:
    """A GGUF file that llama.cpp runs.

    Args:
        file: the file.
        tokens: of the longest text. As many threads as torch's compute.

    Raises:
        ValueError: if llama.cpp cannot read it.
    """

    def __init__(self, file: Path, tokens: int) -> None:
        self._library = _load()
        self._model = self._library.llama_model_load_from_file(
            str(file).encode(), self._library.llama_model_default_params()
        )
        if not self._model:
            raise ValueError(f"llama.cpp cannot read {file}")
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = tokens
        self._context = self._library.llama_init_from_model(self._model, parameters)
        self._library.llama_set_n_threads(self._context, torch.get_num_threads(), torch.get_num_threads())
        self.vocabulary = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model))

    def close(self) -> None:
        """Let go of the model's memory."""
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def read(self, tokens: Sequence[int], start: int = 0, needs_all: bool = False) -> Tensor:
        """Logits after tokens that follow what was read before, `[tokens or 1, vocabulary]`.

        Args:
            tokens: to read.
            start: place of the first; 0 forgets what was read before.
            needs_all: after each token, not the last alone.
        """
        if start == 0:
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        count = len(tokens)
        batch = _Batch(
            count,
            (ctypes.c_int32 * count)(*tokens),
            None,
            (ctypes.c_int32 * count)(*range(start, start + count)),
            None,
            None,
            (ctypes.c_int8 * count)(*[needs_all] * (count - 1), True),
        )
        code = self._library.llama_decode(self._context, batch)
        assert code == 0, code
        shape = (count if needs_all else 1, self.vocabulary)
        return torch.from_numpy(np.ctypeslib.as_array(self._library.llama_get_logits(self._context), shape).copy())


def measure_perplexity(file: Path, windows: Tensor) -> float:
    """Perplexity over windows `[windows, tokens]`, each read by itself."""
    model, loss = LlamaCpp(file, windows.shape[1]), 0.0
    for window in windows:
        logits_TV = model.read(window.tolist(), needs_all=True)[:-1]
        loss += torch.nn.functional.cross_entropy(logits_TV, window[1:], reduction="sum").item()
    model.close()
    return math.exp(loss / windows[:, 1:].numel())


def measure_seconds(files: Sequence[Path], prompt: int, generated: int, turns: int) -> list[list[Seconds]]:
    """Seconds of a prompt and of tokens after it, by turn and file: all files take turns in this process.

    A first turn warms up and does not count, and each turn begins with another file. The tokens are the same arbitrary
    ones for all.
    """
    models = [LlamaCpp(file, prompt + generated) for file in files]
    tokens = torch.randint(models[0].vocabulary, (prompt + generated,), generator=torch.Generator().manual_seed(0))
    found = []
    for turn in range(turns + 1):
        order = [(turn + place) % len(models) for place in range(len(models))]
        seconds = {place: _time(models[place], tokens.tolist(), prompt) for place in order}
        found.append([seconds[place] for place in range(len(models))])
    for model in models:
        model.close()
    return found[1:]


def _time(model: LlamaCpp, tokens: Sequence[int], prompt: int) -> Seconds:
    start = read_clock("cpu")
    model.read(tokens[:prompt])
    middle = read_clock("cpu")
    for place in range(prompt, len(tokens)):
        model.read(tokens[place : place + 1], place)
    return Seconds(middle - start, read_clock("cpu") - middle)
