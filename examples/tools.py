"""Let the model call a function: python examples/tools.py [MODEL]"""

import operator
import sys

from qwq_local import QwQ

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Computes an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def calculate(expression: str) -> object:
    left, sign, right = expression.split()
    return OPERATIONS[sign](int(left), int(right))


with QwQ.open(sys.argv[1] if len(sys.argv) > 1 else "models/nano-qwq") as qwq:
    session = qwq.session(tools=[CALCULATOR])
    reply = session.ask("What is 38 * 27? Use the calculator.")
    for call in reply.tool_calls:
        print(f"{call.name}({call.arguments})", file=sys.stderr)
        session.tool_result(call.id, calculate(call.arguments["expression"]))
    if reply.tool_calls:
        reply = session.ask()
    print(reply.answer)
