"""Let the model call a function: python examples/tools.py [MODEL]"""

import operator
import sys

from qwq_local import QwQ

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def calculator(expression: str) -> object:
    """Computes an arithmetic expression."""
    match expression.split():
        case [left, sign, right] if sign in OPERATIONS and (left + right).isdigit():
            return OPERATIONS[sign](int(left), int(right))
        case _:
            return {"error": "give two numbers and + - or * between them"}


with QwQ.open(sys.argv[1] if len(sys.argv) > 1 else "models/nano-qwq") as qwq:
    session = qwq.session(tools=[calculator])
    reply = session.run("What is 38 * 27? Use the calculator.")
    for message in session.messages:
        for call in message.get("tool_calls", ()):
            print(call["function"], file=sys.stderr)
    print(reply.answer or "(no answer)")
