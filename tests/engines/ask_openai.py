"""Ask a server through the OpenAI client; run by the engines' own Python.

python ask_openai.py ADDRESS MODEL PROMPT
"""

import json
import sys

from openai import OpenAI

address, model, prompt = sys.argv[1:]
client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120)
settings = {"model": model, "max_tokens": 16, "temperature": 0}
completion = client.completions.create(
    prompt=prompt, logprobs=1, extra_body={"return_token_ids": True, "ignore_eos": True}, **settings
).choices[0]
chat = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **settings)
answer = {
    "models": [each.id for each in client.models.list()],
    "ids": completion.token_ids,
    "log_probabilities": completion.logprobs.token_logprobs,
    "reply": chat.choices[0].message.content,
}
print(json.dumps(answer))
