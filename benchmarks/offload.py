"""Prunes a synthetic Llama several times larger than the memory it is given, and says how much memory that took.

    python benchmarks/offload.py --limit 800

The model is random, float32, and written file by file, so that making it takes no memory for it either; its tokenizer
has one token per byte, and the text is the embedded one. `gqaprune prune` runs on it in a process of its own: with
layers on disk under the limit, the same in memory under the limit, and both without one. The limit is a memory control
group, where this process may make one (page cache counts there, but is given up before anything fails), else
RLIMIT_DATA. Anonymous memory and all resident memory, with mapped files, are read from /proc many times a second.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import MALLOC
from quality_report import format_table, splice
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from gqaprune.models.sources import find_tensors

HERE = Path(__file__).parent
BEGIN, END = "<!-- offload:begin -->", "<!-- offload:end -->"
GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
LIMITS = ("memory.limit_in_bytes", "memory.max")
"""Where a control group's limit is, in version 1 and 2."""
MIB = 2**20
COMMAND = [
    sys.executable, str(HERE.parent / "cli.py"), "prune", "--pruning.rate", "0.2", "--pruning.criterion", "obs",
    "--pruning.repair.epochs", "1", "--pruning.repair.ridges", "[0.3]", "--data.calibration.windows", "8",
    "--data.calibration.window", "64", "--data.calibration.batch_size", "2", "--data.evaluation.window", "64",
    "--data.evaluation.tokens", "256",
    "--trainer.accelerator", "cpu", "--trainer.logger", "false",
]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of the command.

    Args:
        name: of its row.
        limit: MiB that it was given; none if 0.
        kind: what held it to that.
        code: exit code.
        seconds: until it ended.
        anonymous: bytes of anonymous memory at its peak.
        resident: bytes of resident memory at its peak.
        folder: where it was to write the model.
    """

    name: str
    limit: int
    kind: str
    code: int
    seconds: float
    anonymous: int
    resident: int
    folder: Path


def write_model(folder: Path, layers: int) -> int:
    """Write a random Llama, one layer in memory at a time; bytes of its weights."""
    config = LlamaConfig(
        hidden_size=1536, intermediate_size=1536, num_attention_heads=12, num_key_value_heads=3, vocab_size=512,
        num_hidden_layers=layers, bos_token_id=256, eos_token_id=257, dtype="float32",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    tokenizer = Tokenizer(
        models.BPE(vocab={s: i for i, s in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    width, keys, channels = config.hidden_size, config.num_key_value_heads * config.head_dim, config.intermediate_size
    layer = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (channels, width), "mlp.up_proj": (channels, width),
        "mlp.down_proj": (width, channels), "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    outside = {
        "model.embed_tokens": (config.vocab_size, width),
        "model.norm": (width,),
        "lm_head": (config.vocab_size, width),
    }
    parts = [
        outside,
        *({f"model.layers.{index}.{name}": shape for name, shape in layer.items()} for index in range(layers)),
    ]
    generator, places, size = torch.Generator().manual_seed(0), {}, 0
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {
            f"{name}.weight": torch.randn(shape, generator=generator) * 0.02 if len(shape) == 2 else torch.ones(shape)
            for name, shape in part.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def make_group(limit: int) -> Path | None:
    """A control group whose processes have so many MiB of memory together; none where this process may not make one."""
    for root, name in zip(GROUPS, LIMITS, strict=True):
        group = root / f"gqaprune-{os.getpid()}"
        try:
            group.mkdir()
            (group / name).write_text(str(limit * MIB))
            return group
        except OSError:
            if group.is_dir():
                group.rmdir()
    return None


def drop_cache(folder: Path) -> None:
    """Forget a folder's files, so that a run pays for the memory that it reads them into."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(name: str, model: Path, root: Path, limit: int, arguments: list[str]) -> Run:
    """Run the command to its end; what it took."""
    folder = root / name.replace(" ", "-")
    folder.mkdir()
    group = make_group(limit) if limit else None
    drop_cache(model)

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        elif limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit * MIB, limit * MIB))

    command = [*COMMAND, "--model.pretrained", str(model), "--export.folder", str(folder / "pruned"), *arguments]
    anonymous = resident = 0
    start = time.perf_counter()
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | MALLOC, preexec_fn=enter, stdout=output, stderr=subprocess.STDOUT
        )
        while process.poll() is None:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
            anonymous = max(anonymous, sizes.get("RssAnon", 0))
            resident = max(resident, sizes.get("VmHWM", 0))
            time.sleep(0.02)
    seconds = time.perf_counter() - start
    if group is not None:
        group.rmdir()
    kind = "none" if not limit else "RLIMIT_DATA" if group is None else "control group"
    done = Run(name, limit, kind, process.returncode, seconds, anonymous, resident, folder / "pruned")
    print(done, (folder / "output").read_text()[-1000:] if process.returncode else "", flush=True)
    return done


def count_different(one: Path, other: Path) -> int:
    """Tensors of two checkpoints that are not the same bit for bit."""
    first, second = find_tensors(one), find_tensors(other)
    different = len(first.keys() ^ second.keys())
    for name in first.keys() & second.keys():
        with safe_open(first[name], "pt") as left, safe_open(second[name], "pt") as right:
            different += not torch.equal(left.get_tensor(name), right.get_tensor(name))
    return different


def describe(done: Run) -> list[str]:
    """A row of the table."""
    if done.code:
        outcome = "killed" if done.code == -signal.SIGKILL else f"fails, exit code {done.code}"
    else:
        report = done.folder.parent / "report.json"
        outcome = f"{json.loads(report.read_text())['rate_reached']:.2%}"
    limit = f"{done.limit} MiB" if done.limit else "none"
    peaks = [f"{size / MIB:,.0f} MiB" for size in (done.anonymous, done.resident)]
    return [done.name, limit, *peaks, f"{done.seconds:.0f} s", outcome]


def main() -> int:
    """Measure, print, and write the table into results/large_models.md; the exit code is 1 if the weights differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=800, help="MiB")
    parser.add_argument("--layers", type=int, default=60, help="of the model, 50 MiB each")
    parser.add_argument(
        "--results", type=Path, default=HERE / "results/large_models.md", help="Markdown file for the table"
    )
    parser.add_argument("--work", type=Path, help="folder on a disk, for three times the model; a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as temporary:
        root = Path(temporary)
        (root / "model").mkdir()
        size = write_model(root / "model", options.layers)
        offload = ["--pruning.offload", "true"]
        limited = run("offload", root / "model", root, options.limit, offload)
        in_memory = run("in memory, the same limit", root / "model", root, options.limit, [])
        whole = run("in memory", root / "model", root, 0, [])
        different = count_different(limited.folder, whole.folder) if limited.code == 0 else -1
        head = ["run", f"limit ({limited.kind})", "peak anonymous memory", "peak resident memory", "time", "removed"]
        lines = [
            BEGIN, "", f"The model: {options.layers} layers, {size / MIB:,.0f} MiB of float32 weights.", "",
            *format_table(head, [describe(done) for done in (limited, in_memory, whole)]), "",
            f"Tensors of the first and the last row's checkpoints that differ in any bit: {different}.", "", END,
        ]  # fmt: skip
    print("\n".join(lines))
    splice(options.results, "\n".join(lines), BEGIN, END, "A model larger than memory")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
