"""Ask vLLM about checkpoints; run by the engines' own Python, where gqaprune is not installed.

    python ask_vllm.py QUESTIONS.json ANSWERS.json

Questions: a list of `{"folder", "ids", "arguments"}`. Answers, as many: `{"log_probabilities", "text", "cache"}`: of
each token of the prompt but the first, of the greedy continuation of its first half, and how many tokens the KV cache
holds; or `{"error"}`. What fails may leave vLLM unusable, so that nothing is asked after it.
"""

import gc
import json
import sys
from pathlib import Path

CACHE_BYTES = 2**25


def ask(question):
    from vllm import LLM, SamplingParams

    ids = question["ids"]
    engine = LLM(
        question["folder"],
        enforce_eager=True,
        max_model_len=len(ids) + 8,
        max_num_seqs=2,
        max_num_batched_tokens=len(ids) + 8,
        kv_cache_memory_bytes=CACHE_BYTES,
        disable_log_stats=True,
        **{"dtype": "float32", **question["arguments"]},
    )
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    scored = engine.generate({"prompt_token_ids": ids}, settings, use_tqdm=False)[0]
    half = len(ids) // 2
    settings = SamplingParams(max_tokens=half, temperature=0, ignore_eos=True)
    continued = engine.generate({"prompt_token_ids": ids[:half]}, settings, use_tqdm=False)[0]
    cache = engine.llm_engine.vllm_config.cache_config
    return {
        "log_probabilities": [
            scored.prompt_logprobs[place][token].logprob for place, token in enumerate(ids) if place > 0
        ],
        "text": list(continued.outputs[0].token_ids),
        "cache": cache.num_gpu_blocks * cache.block_size,
    }


def main():
    answers = []
    for question in json.loads(Path(sys.argv[1]).read_text()):
        try:
            answers.append(ask(question))
        except Exception as error:
            answers.append({"error": f"{type(error).__name__}: {error}"})
            break
        finally:
            Path(sys.argv[2]).write_text(json.dumps(answers))
        gc.collect()


if __name__ == "__main__":
    main()
