"""A packed omni model on two accelerators writes and says what it does on one.

In float32, where the sums of two ranks give the same tokens; it shows that what ranks exchange is right.
"""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import serving
import torch
from tiny_omni import packed_qwen2_5_omni

from quantkit_runtime.server.protocol import ModelSpec
from quantkit_runtime.server.settings import Settings

pytestmark = [pytest.mark.gpu, pytest.mark.multi_rank]

TEXTS = [f"{'red ' * count}{count}" for count in range(1, 5)]


@pytest.fixture(scope="module")
def device():
    if not torch.accelerator.is_available() or torch.accelerator.device_count() < 2:
        pytest.skip("fewer than two accelerators")
    return torch.accelerator.current_accelerator().type


@pytest.fixture(scope="module")
def folder(device, tmp_path_factory):
    del device
    return packed_qwen2_5_omni(tmp_path_factory.mktemp("omni"))


def answers(folder, device, ranks, state):
    """Return what is written to all texts at once, and what is said to the first."""
    spec = ModelSpec(path=str(folder), device=device, dtype="float32", tensor_parallel=ranks)
    with (
        serving.running(Settings({"omni": spec}, port=0, state_dir=state)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(len(TEXTS)) as pool,
    ):

        def ask(text, **more):
            made = client.chat.completions.create(
                model="omni", messages=[{"role": "user", "content": text}], max_tokens=16, temperature=0.0,
                extra_body={"repetition_penalty": 1.5}, **more,
            )  # fmt: skip
            return made.choices[0].message

        written = [message.content for message in pool.map(ask, TEXTS)]
        spoken = ask(TEXTS[0], seed=1, modalities=["text", "audio"], audio={"voice": "Chelsie", "format": "wav"})
    return written, spoken.audio.transcript


def test_two_accelerators_write_and_say_what_one_does(folder, device, tmp_path):
    together = answers(folder, device, 2, tmp_path / "two")
    assert together == answers(folder, f"{device}:0", 1, tmp_path / "one")
    assert len(set(together[0])) == len(TEXTS)
