"""Ask one question: python examples/ask.py [MODEL]"""

import sys

from qwq_local import QwQ

with QwQ.open(sys.argv[1] if len(sys.argv) > 1 else "models/nano-qwq") as qwq:
    reply = qwq.ask("Which is larger, 9.9 or 9.11?")
    print(reply.reasoning, reply.answer, sep="\n---\n")
