"""Errors as an OpenAI client reads them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from quantkit_runtime.server.protocol import Failed

if TYPE_CHECKING:
    from collections.abc import Mapping

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
NO_RETRY = {"x-should-retry": "false"}
"""Header without which the openai client tries a 5xx again."""


class ApiError(Exception):
    """An answer other than 2xx.

    Args:
        status: HTTP status.
        message: For the caller: the field, what is wrong, the limit.
        param: Field of the request.
        code: Short name for programs.
        headers: More headers of the answer.
    """

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
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the answer."""
        return JSONResponse(self.body(), self.status, headers=self.headers)


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Return a 400 about one field."""
    return ApiError(400, message, param=param, code=code)


def error_of(failed: Failed) -> ApiError:
    """Return what a caller is told of a request that has no result."""
    if failed.kind == "refused":
        return bad_request(failed.message, failed.param)
    if failed.kind == "timeout":
        return ApiError(504, failed.message, code="timeout", headers=NO_RETRY)
    if failed.kind == "out_of_memory":
        return ApiError(507, failed.message, code="out_of_memory", headers=NO_RETRY)
    if failed.kind == "engine_down":
        return ApiError(503, failed.message, code="engine_down", headers={"Retry-After": "5"})
    if failed.kind == "stopped":
        return ApiError(503, failed.message, code="server_stopping", headers={"Retry-After": "5"})
    if failed.kind == "cancelled":
        return ApiError(499, "cancelled by the client", code="cancelled")
    return ApiError(500, "the model failed on this request; the server's log says why", code="internal_error")


def add_handlers(app: FastAPI) -> None:
    """Give every error of this app the one shape."""

    @app.exception_handler(ApiError)
    async def api_error(_request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return _of_validation(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, ApiError):  # FastAPI takes whatever ends the reading of a body for damage
            return error.__cause__.response()
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        headers = dict(error.headers or {})
        if error.status_code == 405:  # Starlette tells the methods of the first of a path's routes only
            operations = request.app.openapi()["paths"].get(getattr(request.scope.get("route"), "path_format", ""))
            headers["Allow"] = ", ".join(sorted(operations)).upper() if operations else headers["Allow"]
        return ApiError(error.status_code, str(error.detail), code=code, headers=headers).response()


def _of_validation(error: RequestValidationError) -> ApiError:
    problems = error.errors()
    # Of a field that may be several things every reading is told; the deepest went furthest before it failed.
    first = max(problems, key=lambda problem: len(problem["loc"]))
    if first["type"] == "json_invalid":
        return bad_request(
            f"body: not valid JSON ({first.get('ctx', {}).get('error', first['msg'])})", code="invalid_json"
        )
    path = _path(first["loc"])
    name = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        return bad_request(f"{name}: unknown field", name, "unknown_parameter")
    if first["type"] == "missing":
        return bad_request(f"{name or 'body'}: required", name, "missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f", not {given!r}" if isinstance(given, (int, float, str)) and len(repr(given)) < 80 else ""
    return bad_request(f"{name or 'body'}: {message}{shown}", name)


def _path(parts: tuple[int | str, ...]) -> list[str]:
    """Return where in a body something is, without pydantic's own names for readings of a field."""
    path: list[str] = []
    for part in map(str, parts[1:]):  # the first is "body", "query" ...
        if part == "str" or "[" in part or (path and path[-1] == part):
            continue
        path.append(part)
    return path
