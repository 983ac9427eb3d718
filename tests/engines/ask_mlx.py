"""Ask mlx-lm about checkpoints, as `ask_vllm.py` asks vLLM; run by the engines' own Python."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model


def ask(question):
    ids = question["ids"]
    model, _ = load_model(Path(question["folder"]), trust_remote_code=True)
    scores = nn.log_softmax(model(mx.array([ids]))[0], axis=-1)
    half = len(ids) // 2
    return {
        "log_probabilities": [scores[place, token].item() for place, token in enumerate(ids[1:])],
        "text": [int(token) for token, _ in generate_step(mx.array(ids[:half]), model, max_tokens=half)],
    }


if __name__ == "__main__":
    answers = [ask(question) for question in json.loads(Path(sys.argv[1]).read_text())]
    Path(sys.argv[2]).write_text(json.dumps(answers))
