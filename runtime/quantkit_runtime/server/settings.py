"""What a server is started with."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from quantkit_runtime.errors import QuantkitRuntimeError
from quantkit_runtime.server.protocol import ModelSpec
from quantkit_runtime.server.supervisor import Patience

API_KEY_VARIABLE = "QUANTKIT_API_KEY"


class SettingsError(QuantkitRuntimeError):
    """An option of the server cannot be used; the message names it."""


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take.

    Attributes:
        max_queue: Requests that wait, per model; more get 429.
        request_timeout_s: From arrival to answer.
        max_pixels: Width times height.
        max_frames: Of a video.
        max_steps: Denoising steps.
        max_tokens: Of an answer.
        max_prompt_chars: Of a prompt, or of all messages together.
        max_body_bytes: Of a request.
        max_upload_bytes: Of one picture or sound.
        max_upload_pixels: Of all pictures in a request together, decoded.
        max_audio_s: Of all sounds in a request together.
        max_jobs: Video jobs that wait.
        job_ttl_s: Time that a finished video is kept.
        job_quota_bytes: Of all files of jobs together.
    """

    max_queue: int = 64
    request_timeout_s: float = 600.0
    max_pixels: int = 2048 * 2048
    max_frames: int = 257
    max_steps: int = 200
    max_tokens: int = 8192
    max_prompt_chars: int = 32_768
    max_body_bytes: int = 64 * 2**20
    max_upload_bytes: int = 20 * 2**20
    max_upload_pixels: int = 16 * 2**20
    max_audio_s: float = 600.0
    max_jobs: int = 1000
    job_ttl_s: float = 24 * 3600.0
    job_quota_bytes: int = 20 * 2**30


@dataclass(frozen=True)
class Cluster:
    """How many copies of the app run on a Ray cluster.

    Attributes:
        address: Of a running cluster, ``auto`` for the one of this machine; None starts one here.
        min_replicas: Copies at least.
        max_replicas: Copies at most; more than the least follow the load.
        target_requests: Running and waiting per copy, beyond which another one is started.
        max_requests: That one copy holds at once; more wait in Ray's queue.
        cpus_per_replica: CPU cores that a copy asks for.
        upscale_delay_s: Time that the load must last before a copy is started.
        downscale_delay_s: Time that it must be gone before one is ended.
    """

    address: str | None = None
    min_replicas: int = 1
    max_replicas: int = 1
    target_requests: float = 2.0
    max_requests: int = 16
    cpus_per_replica: float = 1.0
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise SettingsError(
                f"--max-replicas {self.max_replicas}: must be at least --min-replicas, which is at least 1"
            )
        if not 0 < self.target_requests < math.inf:
            raise SettingsError(f"--target-requests {self.target_requests:g}: must be a positive number")


@dataclass(frozen=True)
class Settings:
    """A server.

    Attributes:
        models: By the name that requests use; the first is the default.
        reference: Name of the model that the page holds the others against.
        host: Address to bind.
        port: Port to bind; 0 takes a free one.
        api_keys: Any of them opens the API; none is allowed on loopback only.
        allow_remote_media: Fetch pictures and sounds that a request names by URL.
        state_dir: Where video jobs are kept.
        limits: See `Limits`.
        patience: When an engine counts as hung.
        drain_s: Time that requests get after SIGTERM; then they are answered with a 503.
        log_format: ``json`` or ``text``.
        cluster: Where to serve; None is this process.
    """

    models: dict[str, ModelSpec]
    reference: str | None = None
    host: str = "127.0.0.1"
    port: int = 8091
    api_keys: tuple[str, ...] = ()
    allow_remote_media: bool = False
    state_dir: Path | None = None
    limits: Limits = field(default_factory=Limits)
    patience: Patience = field(default_factory=Patience)
    drain_s: float = 30.0
    log_format: str = "json"
    cluster: Cluster | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise SettingsError("no model to serve")
        if not 0 <= self.port <= 65_535:
            raise SettingsError(f"--port {self.port}: must be between 0 and 65535")
        if not 0 <= self.drain_s < math.inf:
            raise SettingsError(f"--drain {self.drain_s:g}: must be a number of seconds, 0 or more")
        if not self.api_keys and not is_loopback(self.host):
            raise SettingsError(
                f"--host {self.host}: other machines could reach it; give an API key by --api-key-file or the "
                f"environment variable {API_KEY_VARIABLE}, or bind 127.0.0.1"
            )

    def jobs_folder(self) -> Path:
        """Return where jobs are kept: as given, or a folder of this port's in the user's state directory."""
        if self.state_dir is not None:
            return self.state_dir
        home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        return home / "quantkit-server" / str(self.port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_api_keys(file: Path | None) -> tuple[str, ...]:
    """Read keys from a file, one in each line, or from the environment.

    Lines that are empty or begin with ``#`` are skipped.

    Raises:
        SettingsError: The file cannot be read or holds none, or a key holds white space, which no request can send.
    """
    if file is None:
        source, lines = API_KEY_VARIABLE, [os.environ.get(API_KEY_VARIABLE, "")]
    else:
        source = f"--api-key-file {file}"
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{source}: cannot be read ({error})") from error
    keys = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if len(line.split()) > 1 and not line.startswith("#"):  # the line itself is not shown: it may be a key
            raise SettingsError(f"{source}: line {number} holds white space; write one key per line")
        if line and not line.startswith("#"):
            keys.append(line)
    if file is not None and not keys:
        raise SettingsError(f"{source}: holds no key; write one per line")
    return tuple(keys)
