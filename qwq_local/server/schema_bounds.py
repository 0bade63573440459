"""How large and deep a JSON schema from a client may be before it is turned into a grammar."""

import json
from typing import Any

from qwq_local.server.errors import ApiError

MOST_NBYTES = 64 << 10
DEEPEST = 32
MOST_REPEATS = 4096
"""Of items, characters or repeats in a pattern: a grammar spells each of them out."""
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")


def check_schema(schema: dict[str, Any], param: str) -> None:
    """Raises ApiError where a schema is too large, too deep, or refers to something elsewhere."""
    nbytes = len(json.dumps(schema).encode())
    if nbytes > MOST_NBYTES:
        _refuse(param, f"{nbytes:,} bytes, and {MOST_NBYTES:,} are allowed")
    _check(schema, param, depth=1)


def _check(value: Any, param: str, depth: int) -> None:
    if depth > DEEPEST:
        _refuse(param, f"more than {DEEPEST} levels deep")
    if isinstance(value, list):
        for item in value:
            _check(item, param, depth + 1)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key == "$ref" and not (isinstance(item, str) and item.startswith("#")):
            _refuse(param, f"$ref {item!r} is not within the schema")
        if key in _COUNTS and isinstance(item, int | float) and not 0 <= item <= MOST_REPEATS:
            _refuse(param, f"{key} is {item}, and 0 to {MOST_REPEATS:,} is allowed")
        if key == "pattern" and isinstance(item, str):
            _check_pattern(item, param)
        _check(item, param, depth + 1)


def _check_pattern(pattern: str, param: str) -> None:
    product = 1 if len(pattern) <= 1024 else MOST_REPEATS + 1
    for braces in pattern[:1024].split("{")[1:]:
        counts = [int(c) for c in braces.partition("}")[0].split(",") if c.strip().isdecimal()]
        product *= max([1, *counts])
    if product > MOST_REPEATS:
        _refuse(param, f"the pattern {pattern[:40]!r} is too long or repeats too often")


def _refuse(param: str, problem: str) -> None:
    raise ApiError(
        400, f"{param}: {problem}; use a plainer schema", param=param, code="invalid_json_schema"
    )
