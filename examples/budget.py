"""Bound the thought, put a hint into it, and stop waiting for it: examples/budget.py [MODEL]"""

import sys
import threading

from qwq_local import Answer, Done, Notice, QwQ, Reasoning

with QwQ.open(sys.argv[1] if len(sys.argv) > 1 else "models/nano-qwq") as qwq:
    session = qwq.session(system="Be brief.")
    stream = session.send("What is 417 + 58?", reasoning_tokens=200, reasoning_seconds=30)
    stream.steer("add the ones first")
    impatient = threading.Timer(10, stream.answer_now)  # from any thread, as cancel() is
    impatient.start()
    for event in stream:
        match event:
            case Reasoning(text):
                print(text, end="", file=sys.stderr, flush=True)
            case Answer(text):
                print(text, end="", flush=True)
            case Done(usage=usage):
                print(f"\n[{usage.reasoning_tokens} tokens of thought]")
            case Notice(kind, text):
                print(f"\n[{kind}: {text}]", file=sys.stderr)
    impatient.cancel()
