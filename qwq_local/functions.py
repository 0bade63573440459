"""Plain Python functions as tools: their descriptions, and calling them."""

import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from convert.errors import UsageError

Function = Callable[..., object]

_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def describe_function(function: Function) -> dict[str, Any]:
    """A tool in OpenAI's form, from a function's name, docstring and type hints.

    Hints may be str, int, float, bool, None, Literal, list, dict and unions of these. Raises
    UsageError for another hint, and for parameters that have no name.
    """
    name = function.__name__
    parameters = inspect.signature(function).parameters
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError) as error:
        raise UsageError(
            f"{name}: its type hints cannot be read ({error}); correct them"
        ) from error
    properties: dict[str, Any] = {}
    for parameter in parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UsageError(f"{name}: {parameter} has no name for a call; give each parameter one")
        hint = hints.get(parameter.name, Any)
        properties[parameter.name] = _schema(hint, f"{name}.{parameter.name}")
    required = [p.name for p in parameters.values() if p.default is p.empty]
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": inspect.getdoc(function) or "",
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


def call_function(function: Function, arguments: Mapping[str, Any]) -> object:
    """What the function returns, or for arguments that do not fit an object that says so.

    Errors that the function itself raises are the caller's to handle.
    """
    try:
        bound = inspect.signature(function).bind(**arguments)
    except TypeError as error:
        return {"error": str(error)}
    return function(*bound.args, **bound.kwargs)


def as_text(result: object) -> str:
    """What a tool's message says: a string as it is, anything else as JSON.

    Raises UsageError for what JSON has no form for.
    """
    if isinstance(result, str):
        return result
    try:
        return json.dumps(result, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"tool result: {error}; return text or what JSON can hold") from error


def _schema(hint: Any, where: str) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(choice, where) for choice in arguments]}
    if list in (hint, origin):
        return {"type": "array"} | ({"items": _schema(arguments[0], where)} if arguments else {})
    if dict in (hint, origin):
        return {"type": "object"}
    raise UsageError(f"{where}: no JSON has the type {hint!r}; use str, int, list and the like")
