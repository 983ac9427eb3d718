"""The command on the card of a checkpoint starts a server, which a client of OpenAI's interface talks to."""

import json
import re
import shlex
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gqaprune.checkpoints.save import save
from gqaprune.surgery.cut import apply_plan

from cuts import make_plan
from tiny import CHAT_TEMPLATE, make_model, make_tokenizer

STARTS_WITHIN = 400
"""Seconds in which the server has to answer, on two cores."""
PROMPT = "It was the best of times"


def find_free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def serve(command: list[str], address: str, log: Path, **options: object) -> Iterator[None]:
    """Run a server until the block ends."""
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **options)  # type: ignore[call-overload]
        try:
            deadline = time.monotonic() + STARTS_WITHIN
            while True:
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except (urllib.error.URLError, ConnectionError, TimeoutError):
                    time.sleep(1)
            yield
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def test_the_cards_command_serves_a_pruned_model(engines: Path, environment: dict[str, str], tmp_path: Path) -> None:
    model, tokenizer = make_model("qwen2", kv_heads=3, ratio=7, head_dim=32, channels=96), make_tokenizer()
    plan = make_plan(model, [[0, 2], [1], [0, 1, 2]], [[3, 9, 40], list(range(50)), list(range(90))])
    apply_plan(model, plan)
    tokenizer.chat_template = CHAT_TEMPLATE
    assert save(model, tokenizer, tmp_path / "pruned", plan) == "per-layer"
    found = re.search(r"^vllm serve .*$", (tmp_path / "pruned/README.md").read_text(), re.MULTILINE)
    assert found is not None
    port = find_free_port()
    options = f"--host 127.0.0.1 --port {port} --dtype float32 --enforce-eager --max-model-len 128 --max-num-seqs 2"
    command = [
        str(engines / "python"),
        str(Path(__file__).parent / "run_vllm.py"),
        *shlex.split(f"{found[0]} {options}")[1:],
    ]
    address = f"http://127.0.0.1:{port}"
    environment = {name: value for name, value in environment.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with serve(command, address, tmp_path / "log", cwd=tmp_path, env=environment):
        done = subprocess.run(
            [engines / "python", Path(__file__).parent / "ask_openai.py", address, "pruned", PROMPT],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        text = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
        log_probabilities = model(text).logits.log_softmax(-1)[0, :-1].gather(1, text[0, 1:, None])[-16:, 0]
    assert answer["models"] == ["pruned"]
    assert answer["ids"] == text[0, -16:].tolist()
    assert answer["log_probabilities"] == pytest.approx(log_probabilities.tolist(), abs=1e-4)
    assert isinstance(answer["reply"], str)
