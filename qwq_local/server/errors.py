"""What goes wrong, in OpenAI's form and with its status codes."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from qwq_local import ContextError, EngineError, QwqError, UsageError
from qwq_local.server.schema import ErrorBody, ErrorDetails

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

_WIRE_NAMES = {"answer_format": "response_format"}
"""What a request calls what the runtime calls otherwise."""


class ApiError(Exception):
    """An answer that is an error. param: the field that is at fault, code: for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        details = ErrorDetails(message=self.message, type=kind, param=self.param, code=self.code)
        return ErrorBody(error=details).model_dump()

    @property
    def anthropic_body(self) -> dict[str, Any]:
        kind = self.body["error"]["type"]
        kind = {"server_error": "api_error"}.get(kind, kind)
        return {"error": {"type": kind, "message": self.message}}

    def response(self, path: str) -> JSONResponse:
        """The error as the interface at a path has it."""
        body = self.body
        if path.startswith("/v1/messages"):
            body = {"type": "error"} | self.anthropic_body
        return JSONResponse(body, self.status, self.headers)


def api_error(error: QwqError) -> ApiError:
    """What a client is told of an error of the runtime's."""
    message = str(error)
    match error:
        case ContextError():
            return ApiError(400, message, param="messages", code="context_length_exceeded")
        case EngineError():
            return ApiError(503, message, code="engine_died", headers={"Retry-After": "2"})
        case UsageError():
            name, _, problem = message.partition(":")
            name = _WIRE_NAMES.get(name, name)
            return ApiError(400, f"{name}:{problem}", param=name, code="invalid_value")
        case _:
            return ApiError(400, message, code="invalid_request")


def handle_errors(app: FastAPI) -> None:
    """Give every error of an app its interface's form."""

    @app.exception_handler(ApiError)
    async def _(request: Request, error: ApiError) -> JSONResponse:
        return error.response(request.url.path)

    @app.exception_handler(QwqError)
    async def _(request: Request, error: QwqError) -> JSONResponse:
        return api_error(error).response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error).response(request.url.path)

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path[:200]!r}: {error.detail}"
        return ApiError(error.status_code, message).response(request.url.path)


def _invalid(error: RequestValidationError) -> ApiError:
    # of a union's branches the one that went deepest says most
    first = max(error.errors(), key=lambda one: len(one["loc"]))
    if first["type"] == "json_invalid":
        return ApiError(400, f"body: no valid JSON: {first['ctx']['error']}", code="invalid_json")
    field = _field(first["loc"])
    message = f"{field or 'body'}: {first['msg']}"
    return ApiError(400, message, param=field or None, code="invalid_value")


def _field(location: tuple[int | str, ...]) -> str:
    """("body", "messages", 0, "ChatMessage", "role") as messages[0].role."""
    name = ""
    for part in location[1:]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part.isidentifier() and part.islower() and part not in ("str", "int", "dict", "list"):
            name += f".{part}" if name else part
    return name
