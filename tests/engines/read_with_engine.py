"""Run by the Python of an engine, which has no gqaprune: `read_with_engine.py vllm|mlx FOLDER REQUEST ANSWER`.

REQUEST is a JSON file with `prompts`, lists of token ids, and `generated`, a number of tokens. ANSWER gets `scores`,
the log-probabilities of the second and each later token of every prompt, and `texts`, the token ids that follow it.
"""

import json
import sys
from pathlib import Path


def read_with_vllm(folder, prompts, generated):
    from vllm import LLM, SamplingParams

    engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=128, trust_remote_code=True)
    settings = SamplingParams(prompt_logprobs=1, temperature=0, max_tokens=generated, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings)
    scores = [
        [place[token].logprob for token, place in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    return scores, [list(output.outputs[0].token_ids) for output in outputs]


def read_with_mlx(folder, prompts, generated):
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder), trust_remote_code=True)
    scores, texts = [], []
    for prompt in prompts:
        logarithms = nn.log_softmax(model(mx.array([prompt]))[0], axis=-1)
        scores.append([logarithms[place, token].item() for place, token in enumerate(prompt[1:])])
        texts.append([int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=generated)])
    return scores, texts


if __name__ == "__main__":
    engine, folder, request, answer = sys.argv[1:]
    scores, texts = globals()[f"read_with_{engine}"](folder, **json.loads(Path(request).read_text()))
    Path(answer).write_text(json.dumps({"scores": scores, "texts": texts}))
