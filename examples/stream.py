"""Watch a reply as it comes, then ask again: python examples/stream.py [MODEL]"""

import sys

from qwq_local import Answer, Done, QwQ, Reasoning

with QwQ.open(sys.argv[1] if len(sys.argv) > 1 else "models/nano-qwq") as qwq:
    session = qwq.session()
    for question in ("What is 417 + 58?", 'How many r\'s are in the word "strawberry"?'):
        for event in session.send(question):
            match event:
                case Reasoning(text):
                    print(text, end="", file=sys.stderr, flush=True)
                case Answer(text):
                    print(text, end="", flush=True)
                case Done(timings=timings) if timings.tokens_per_s:
                    print(f"\n[{timings.tokens_per_s:.0f} tokens/s]", file=sys.stderr)
