"""What happens to every request around its handler: id, access, size of the body, content type, log line."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantkit_runtime.server.errors import ApiError
from quantkit_runtime.server.logs import request_id
from quantkit_runtime.server.security import OPEN_PATHS, KeyRing, check_origin
from quantkit_runtime.server.settings import Settings, is_loopback

log = logging.getLogger(__name__)

_JSON = ("application/json",)
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_TAKES = {
    "/v1/images/generations": _JSON,
    "/v1/chat/completions": _JSON,
    "/v1/audio/speech": _JSON,
    "/v1/images/edits": _FORMS,
    "/v1/videos": _FORMS,
    "/v1/videos/sync": _FORMS,
}
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_QUIET = frozenset({"/health", "/ready", "/metrics"})
_DEFECT = ApiError(500, "internal error; the server's log says more", code="internal_error")
_STOPPING = ApiError(503, "the server stops", code="server_stopping", headers={"Retry-After": "5"})


class Guard:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._keys = KeyRing(settings.api_keys)
        self._max_body_bytes = settings.limits.max_body_bytes
        self._on_loopback = is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        identity = given if _ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        token = request_id.set(identity)
        begin = time.perf_counter()
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = identity
            await send(message)

        try:
            error = self._refusal(scope, headers, identity)
            if error is not None:
                await error.response()(scope, receive, send_marked)
            else:
                await self._app(scope, self._limited(receive), send_marked)
        except asyncio.CancelledError:  # the server stops and waits no longer, for a slow upload as an example
            if status == 0:
                await _STOPPING.response()(scope, receive, send_marked)
            raise
        except Exception as failure:
            log.error("defect in a request handler", exc_info=failure)
            if status == 0:
                await _DEFECT.response()(scope, receive, send_marked)
        finally:
            if scope["path"] not in _QUIET:
                took_ms = round((time.perf_counter() - begin) * 1000, 1)
                extra = {"method": scope["method"], "path": scope["path"], "status": status, "ms": took_ms}
                log.info("request", extra=extra)
            request_id.reset(token)

    def _refusal(self, scope: Scope, headers: Headers, identity: str) -> ApiError | None:
        path = scope["path"]
        try:
            check_origin(headers, bound_to_loopback=self._on_loopback)
            address = scope["client"][0] if scope.get("client") else "local"
            client = address if path in OPEN_PATHS else self._keys.client_of(headers, address)
            scope.setdefault("state", {}).update(client=client, request_id=identity)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                self._check_body(scope["method"], path, headers)
        except ApiError as error:
            return error
        return None

    def _check_body(self, method: str, path: str, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            raise self._too_large()
        given = headers.get("content-type", "").partition(";")[0].strip().lower()
        wanted = _TAKES.get(path) if method == "POST" else None
        if wanted is not None and given not in wanted:
            raise ApiError(
                415,
                f"Content-Type: {wanted[0]} is needed here, not {given or 'nothing'}",
                code="unsupported_content_type",
            )

    def _limited(self, receive: Receive) -> Receive:
        """Count what comes: a length need not be told, nor be true."""
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(413, f"body: at most {self._max_body_bytes} bytes", code="body_too_large")
