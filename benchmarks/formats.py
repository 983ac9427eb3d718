"""Every format of one pruned model, loaded in an environment where gqaprune is not installed.

    python -m venv ../plain && ../plain/bin/pip install torch transformers accelerate gguf torchao
    python benchmarks/formats.py --model benchmarks/work/default@0.2 --python OTHER_ENVIRONMENT/bin/python

The model is written in every format, then the other Python loads each folder with plain transformers and measures how
far its logits are from those of the model in memory. GGUF files that are not padded are
loaded by gqaprune. llama.cpp reads the GGUF files, and the text, by itself.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from quality_report import format_table, splice
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import gqaprune
from gqaprune.checkpoints.save import measure_weights, save
from gqaprune.data.windows import read_windows

HERE = Path(__file__).parent
BEGIN, END = "<!-- formats:begin -->", "<!-- formats:end -->"
WRITTEN = {
    "per-layer": ("auto", None),
    "padded": ("padded", None),
    "per-layer, int8": ("auto", "int8"),
    "padded, int8": ("padded", "int8"),
    "gguf-f16": ("gguf-f16", None),
    "gguf-q8_0": ("gguf-q8_0", None),
    "gguf-f16-padded": ("gguf-f16-padded", None),
    "gguf-q8_0-padded": ("gguf-q8_0-padded", None),
}
"""Row -> format and quantisation. A model of equal counts is `stock` where the first says `per-layer`."""
READ_BY_GQAPRUNE = ("gguf-f16", "gguf-q8_0")

LOADER = """
import json, sys, time
from pathlib import Path
if is_plain := sys.argv[3] == "plain":
    sys.modules["gqaprune"] = None  # any import of it fails
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder, expected = Path(sys.argv[1]), load_file(sys.argv[2])
gguf = [file.name for file in folder.glob("*.gguf")]
remote = (folder / "modeling_pruned.py").exists()
extra = {"gguf_file": gguf[0]} if gguf else {"trust_remote_code": remote}
if is_plain:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **extra).eval()
else:
    from gqaprune import load
    model = load(folder, dtype="float32")[0].eval()
ids, logits = expected["ids"], expected["logits"]
with torch.no_grad():
    error = float((model(ids).logits - logits).norm() / logits.norm())
    divergence = torch.nn.functional.kl_div(
        model(ids).logits.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="sum"
    ) / ids.numel()
text = model.generate(ids[:1, :8], max_new_tokens=8, do_sample=False)
same = model.generate(ids[:1, :8], max_new_tokens=8, do_sample=False, use_cache=False)
print(json.dumps({"class": type(model).__name__, "error": error, "divergence": float(divergence), "remote": remote,
                  "cached": bool(torch.equal(text, same)), "transformers": transformers.__version__}))
"""

LLAMA_CPP = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = sys.argv[1], 512, 1, 0
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # so that the file alone differs
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # which rounds to float16
server, answers = xllamacpp.Server(params), []
for prompt in json.loads(sys.argv[2]):
    answers.append(server.handle_completions({"prompt": prompt, **json.loads(sys.argv[3])}))
print(json.dumps(answers))
"""
PROMPT_TOKENS = (5, 8, 12, 16, 24, 32, 48, 64)


def ask_llama_cpp(file: Path, prompts: Sequence[str]) -> list[tuple[int, list[tuple[int, float]]]]:
    """Of every prompt, its number of tokens as llama.cpp reads it, and its 20 likeliest next tokens.

    Those with their log-probabilities in nats, before the bias that makes the answer a whole character.

    Raises:
        RuntimeError: if llama.cpp cannot read the file, with what it said last.
    """
    settings = {"max_tokens": 1, "logprobs": 20, "logit_bias": [["a", 1000]]}  # half a character is no answer
    answers = _complete(file, prompts, settings)
    likeliest = [answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] for answer in answers]
    return [
        (answer["usage"]["prompt_tokens"], [(each["id"], each["logprob"]) for each in tokens])
        for answer, tokens in zip(answers, likeliest, strict=True)
    ]


def continue_with_llama_cpp(file: Path, prompts: Sequence[str], tokens: int, banned: Sequence[int]) -> list[str]:
    """What llama.cpp writes after each prompt, always the likeliest token that is not banned.

    Raises:
        RuntimeError: as `ask_llama_cpp`.
    """
    settings = {"max_tokens": tokens, "temperature": 0, "logit_bias": [[token, -1000] for token in banned]}
    return [answer["choices"][0]["text"] for answer in _complete(file, prompts, settings)]


def _complete(file: Path, prompts: Sequence[str], settings: dict[str, Any]) -> Any:
    command = [sys.executable, "-c", LLAMA_CPP, str(file), json.dumps(list(prompts)), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{file.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def measure_llama_cpp(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path) -> list[str]:
    """How far llama.cpp's log-probabilities are from those of the model in memory, on average and at most."""
    windows = read_windows(tokenizer, ["embedded"], max(PROMPT_TOKENS), len(PROMPT_TOKENS), 0)
    prompts = [  # llama.cpp adds BOS where the tokenizer does
        tokenizer.decode(window[:count], skip_special_tokens=True)
        for window, count in zip(windows, PROMPT_TOKENS, strict=True)
    ]
    errors, is_same = [], True
    for prompt, (count, answer) in zip(prompts, ask_llama_cpp(file, prompts), strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = model(ids).logits[0, -1].log_softmax(-1)
        errors += [abs(expected[token].item() - found) for token, found in answer]
        is_same = is_same and count == ids.shape[1]
    return [f"{sum(errors) / len(errors):.1e}", f"{max(errors):.1e}", "yes" if is_same else "**no**"]


def measure(options: argparse.Namespace) -> tuple[list[list[str]], list[list[str]]]:
    """One line per format as transformers loads it, and one per GGUF format as llama.cpp does."""
    model, tokenizer = gqaprune.load(options.model, dtype="float32")
    ids = read_windows(tokenizer, ["embedded"], 128, 2, 0)
    with torch.inference_mode():
        logits = model.eval()(ids).logits
    lines, of_llama_cpp = [], []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        save_file({"ids": ids.contiguous(), "logits": logits.contiguous()}, root / "expected.safetensors")
        for name, (format, quantization) in WRITTEN.items():
            folder = root / name.replace(", ", "-")
            source = gqaprune.load(options.model, dtype="bfloat16")[0] if quantization else model
            written = save(source, tokenizer, folder, format=format, quantization=quantization)
            size = measure_weights(folder)
            python, way = (sys.executable, "gqaprune") if format in READ_BY_GQAPRUNE else (options.python, "plain")
            done = subprocess.run(
                [python, "-c", LOADER, str(folder), str(root / "expected.safetensors"), way],
                capture_output=True,
                text=True,
                cwd=root,
            )
            if done.returncode:
                sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            found = json.loads(done.stdout.strip().splitlines()[-1])
            lines.append(
                [
                    name if written != "stock" else name.replace("per-layer", "stock"),
                    found["class"],
                    "yes" if found["remote"] else "no",
                    f"{size / 1e6:.1f} MB",
                    f"{found['error']:.1e}",
                    f"{found['divergence']:.1e}",
                    "same" if found["cached"] else "differs",
                ]
            )
            print(" | ".join(lines[-1]), flush=True)
            for file in folder.glob("*.gguf"):
                of_llama_cpp.append([name, *measure_llama_cpp(model, tokenizer, file)])
                print(" | ".join(of_llama_cpp[-1]), flush=True)
    return lines, of_llama_cpp


def main() -> int:
    """Measure, print, and write the table into results/formats.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a pruned model")
    parser.add_argument("--python", required=True, help="Python of an environment without gqaprune")
    parser.add_argument("--results", type=Path, default=HERE / "results/formats.md")
    options = parser.parse_args()
    header = ["format", "class", "remote code", "weights", "difference of logits", "KL divergence", "cached generation"]
    lines, of_llama_cpp = measure(options)
    table = "\n".join(format_table(header, lines))
    header = ["llama.cpp", "mean difference of log-probabilities", "largest", "as many tokens"]
    table += "\n\n" + "\n".join(format_table(header, of_llama_cpp))
    splice(options.results, f"{BEGIN}\n\n{table}\n\n{END}", BEGIN, END, "Formats, loaded without gqaprune")
    return 0


if __name__ == "__main__":
    sys.exit(main())
