"""QwQ through the openai package: python examples/clients/openai_stream.py [BASE_URL]

Start `qwq serve` first. The key may be anything unless the server asks for its own.
"""

import os
import sys

from openai import OpenAI

client = OpenAI(
    api_key=os.environ.get("QWQ_API_KEY", "none"),
    base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1",
)
completion = client.chat.completions.create(
    model="qwq-32b",
    messages=[{"role": "user", "content": "Which is larger, 9.9 or 9.11?"}],
    stream=True,
    stream_options={"include_usage": True},
)
is_answering = False
for chunk in completion:
    if not chunk.choices:
        print("\n" + "=" * 20, "usage", "=" * 20)
        print(chunk.usage)
        continue
    delta = chunk.choices[0].delta
    if getattr(delta, "reasoning_content", None) is not None:
        print(delta.reasoning_content, end="", flush=True)  # type: ignore[attr-defined]
    else:
        if delta.content and not is_answering:
            print("\n" + "=" * 20, "answer", "=" * 20)
            is_answering = True
        print(delta.content, end="", flush=True)
