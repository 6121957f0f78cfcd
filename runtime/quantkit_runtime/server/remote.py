"""Fetching what a request names by URL, where the operator allows it: from public addresses only."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
from urllib.parse import SplitResult, urlsplit

from quantkit_runtime.server.errors import ApiError, bad_request

_TIMEOUT_S = 10.0  # for each piece
TOTAL_S = 60.0
"""For all that one request names: a thread waits for it, of which there are few."""
_CHUNK = 2**16


def fetch(url: str, max_bytes: int, param: str, total_s: float = TOTAL_S) -> bytes:
    """Fetch a URL; redirects are not followed.

    The address is looked up once and checked, and the connection goes to it, so that a name cannot point elsewhere
    a moment later.

    Args:
        url: http or https.
        max_bytes: Of the answer.
        param: Field of the request, for errors.
        total_s: Until it is given up.

    Raises:
        ApiError: It is no such URL, points into a private network, or does not answer as it should.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise bad_request(f"{param}: is no URL", param, "invalid_url") from None
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise bad_request(f"{param}: is no http or https URL", param, "invalid_url")
    port = port or (443 if parts.scheme == "https" else 80)
    try:
        address = _public_address(host, port, param)
        with socket.create_connection((address, port), min(_TIMEOUT_S, total_s)) as plain:
            return _get(plain, parts, max_bytes, param, total_s)
    except (OSError, http.client.HTTPException, UnicodeError):
        raise bad_request(f"{param}: {host} cannot be reached", param, "fetch_failed") from None


def _public_address(host: str, port: int, param: str) -> str:
    found = {entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    for address in found:
        parsed = ipaddress.ip_address(str(address).partition("%")[0])
        mapped = getattr(parsed, "ipv4_mapped", None)
        if not (mapped or parsed).is_global or parsed.is_multicast:
            raise bad_request(f"{param}: {host} is not a public address", param, "private_address")
    return str(min(found, key=lambda address: (":" in str(address), str(address))))


def _get(plain: socket.socket, parts: SplitResult, max_bytes: int, param: str, total_s: float) -> bytes:
    host = parts.hostname or ""
    connection = http.client.HTTPConnection(host, parts.port or 80, timeout=_TIMEOUT_S)  # it is connected already
    connection.sock = wire = plain
    is_late = threading.Event()

    def give_up() -> None:
        is_late.set()
        with contextlib.suppress(OSError):
            wire.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(total_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        if parts.scheme == "https":
            connection.sock = wire = secure = ssl.create_default_context().wrap_socket(
                plain, server_hostname=host, do_handshake_on_connect=False
            )
            secure.do_handshake()
        # http.client would leave out the port, and the brackets of an IPv6 address.
        name = parts.netloc.encode("idna").decode("ascii")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Host": name, "Accept": "image/*, audio/*"})
        response = connection.getresponse()
        if response.status != 200:
            raise bad_request(f"{param}: {host} answers {response.status}", param, "fetch_failed")
        data = bytearray()
        while piece := response.read(_CHUNK):
            data += piece
            if len(data) > max_bytes:
                raise ApiError(413, f"{param}: larger than {max_bytes} bytes", param=param, code="upload_too_large")
        if response.length or is_late.is_set():  # it was cut off, which http.client does not tell of
            raise http.client.IncompleteRead(bytes(data))
        return bytes(data)
    except (OSError, http.client.HTTPException):
        if not is_late.is_set():
            raise
        most_s = round(total_s, 1)
        raise bad_request(f"{param}: {host} takes more than {most_s:g} s", param, "fetch_failed") from None
    finally:
        timer.cancel()
        connection.close()
