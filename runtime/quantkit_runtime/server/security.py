"""Who may call: API keys, browsers of other sites kept out."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from quantkit_runtime.server.errors import ApiError
from quantkit_runtime.server.settings import is_loopback

OPEN_PATHS = frozenset({"/health", "/ready", "/", "/page.js", "/page.css"})
"""Probes need no key; nor does the page, which asks for one."""


class KeyRing:
    """Keys that open the API; without any, everyone may call."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def client_of(self, headers: Headers, address: str) -> str:
        """Return a name for who calls, which does not tell the key.

        Raises:
            ApiError: No key, or a wrong one (401).
        """
        if not self._digests:
            return address
        scheme, _, given = headers.get("authorization", "").partition(" ")
        digest = _digest(given.strip())
        # All are compared, so that the time tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "missing or wrong API key; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return f"key-{digest.hex()[:12]}"


def check_origin(headers: Headers, *, bound_to_loopback: bool) -> None:
    """Refuse what a page of another site makes a browser send.

    Without a key nothing else protects a server on loopback from the pages that its user looks at.

    Raises:
        ApiError: The origin is another site, or the host name is not this machine's (403).
    """
    host = headers.get("host", "")
    if bound_to_loopback and host and not is_loopback(_host_name(host)):
        raise ApiError(403, f"Host {host!r}: this server answers to localhost only", code="wrong_host")
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        raise ApiError(
            403, f"Origin {origin!r}: requests from pages of other sites are refused", code="wrong_origin"
        )


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
