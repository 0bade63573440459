"""A server with the page whose model thinks slowly enough to be watched, as a program."""

import sys
import time
from pathlib import Path
from typing import Any

import typer

from qwq_local.server.app import ServerSettings
from qwq_local.server.guard import Access
from qwq_local.server.serving import Listening, serve
from tests.qwq_local.server.running import Repeating, fake_qwq

THOUGHT = "Both are below ten, so the tenths decide. " * 8
ANSWER = r"""**9.9** is larger, since \(0.9 > 0.11\):

\[
\begin{aligned} 9.9 - 9.11 &= 0.79 \\ &> 0 \end{aligned}
\]

```python
print(max(9.9, 9.11))  # <b>not bold</b>
```

| number | tenths |
|---|---|
| 9.9 | 9 |
| 9.11 | 1 |
"""
HOSTILE = """<script>document.title = "owned"</script>
<img src="https://evil.example/x.png" onerror="document.title = 'owned'">
[click](javascript:document.title='owned') ![picture](https://evil.example/y.png)
<a href="javascript:document.title='owned'">here</a> $\\text{<img src=x onerror=alert(1)>}$
<math><mtext><style><img src=x onerror="document.title='owned'"></style></mtext></math>
"""
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "<b>Rome</b>"}}\n</tool_call>'


class Scripted(Repeating):
    """Says what the question asks for; a token takes five milliseconds."""

    def generate(self, ids: Any, **options: Any) -> Any:
        prompt = bytes(one for one in ids if one < 256).decode()
        last = prompt.rpartition("user\n")[2]
        wants_call = "weather" in last and "tool\n" not in last
        answer = HOSTILE if "hostile" in last else CALL if wants_call else ANSWER
        self.replies = [f"{THOUGHT}\n</think>\n\n{answer}"]
        made = super().generate(ids, **options)
        change = None
        while True:
            try:
                token = made.send(change)
            except StopIteration:
                return
            time.sleep(0.005)
            change = yield token


def main() -> None:
    key = sys.argv[2] if len(sys.argv) > 2 else None
    serve(
        lambda: fake_qwq(engine=Scripted()),
        ServerSettings("nano-qwq", Access(key=key), page=Path(sys.argv[1])),
        Listening(port=0),
        on_listening=lambda address: typer.echo(address),
    )


if __name__ == "__main__":
    main()
