"""Servers with models that cost nothing, one for all tests of a module."""

from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'server'")

import httpx2
import serving

from quantkit_runtime.server.settings import Limits, Settings
from quantkit_runtime.server.supervisor import Patience

LIMITS = Limits(max_queue=4, request_timeout_s=20.0, max_pixels=256 * 256, max_frames=33, max_steps=50,
                max_tokens=64, max_prompt_chars=500, max_body_bytes=200_000, max_upload_bytes=100_000,
                max_upload_pixels=512 * 512, max_audio_s=2.0, max_jobs=4)  # fmt: skip
PATIENCE = Patience(ping_s=0.2, silence_s=1.0, step_s=5.0, start_s=30.0)


@pytest.fixture(scope="session")
def settings(tmp_path_factory):
    """Make settings that serve fakes by kind: ``settings("images", max_queue=2)``."""

    def make(*kinds, **changes):
        names = {limit.name for limit in fields(Limits)}
        limits = replace(LIMITS, **{name: value for name, value in changes.items() if name in names})
        rest = {name: value for name, value in changes.items() if name not in names}
        return Settings(
            **{
                "models": {kind: serving.spec(kind) for kind in kinds},
                "port": 0,
                "state_dir": tmp_path_factory.mktemp("state"),
                "limits": limits,
                "patience": PATIENCE,
                "drain_s": 5.0,
                **rest,
            }
        )

    return make


@pytest.fixture(scope="module")
def serve(settings):
    """Start a server of these kinds once in a module: ``serve("images").post(...)``.

    Every answer is held against the server's OpenAPI document.
    """
    started = {}
    with ExitStack() as stack:

        def get(*kinds, **changes):
            key = (kinds, *sorted(changes.items()))
            if key not in started:
                server = stack.enter_context(serving.running(settings(*kinds, **changes)))
                client = stack.enter_context(httpx2.Client(base_url=server.url, timeout=30))
                client.server = server
                client.event_hooks["response"].append(partial(serving.check_documented, document=server.document))
                started[key] = client
            return started[key]

        yield get
