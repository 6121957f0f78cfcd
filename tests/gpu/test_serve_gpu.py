"""The server on a CUDA device draws what the pipeline does, recorded and compiled or not."""

import base64
import io

import numpy as np
import openai
import pytest
import serving
import torch
from PIL import Image

from quantkit_runtime import load_pipeline
from quantkit_runtime.server.protocol import ModelSpec
from quantkit_runtime.server.settings import Settings

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.parametrize(
    ("loading", "levels"),
    [({}, 0), ({"cuda_graphs": True}, 0), ({"compile": True, "cuda_graphs": True}, 8)],
    ids=["eager", "recorded", "compiled and recorded"],
)
def test_pictures_over_http_are_those_of_the_pipeline(rtn_checkpoint, tmp_path, loading, levels):
    pipeline = load_pipeline(rtn_checkpoint, device="cuda:0")
    pipeline.set_progress_bar_config(disable=True)
    spec = ModelSpec(str(rtn_checkpoint), device="cuda:0", defaults={"height": 64, "width": 64}, **loading)
    with (
        serving.running(Settings({"flux": spec}, port=0, state_dir=tmp_path)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        for seed in range(3):
            made = client.images.generate(
                prompt="a red circle",
                size="64x64",
                extra_body={"num_inference_steps": 4, "max_sequence_length": 16, "seed": seed},
            )
            found = np.asarray(Image.open(io.BytesIO(base64.b64decode(made.data[0].b64_json))), dtype=int)
            with torch.inference_mode():
                wanted = pipeline(
                    "a red circle",
                    height=64,
                    width=64,
                    num_inference_steps=4,
                    max_sequence_length=16,
                    generator=torch.Generator().manual_seed(seed),
                    output_type="np",
                ).images[0]
            assert np.abs(found - (wanted * 255).round().astype(int)).max() <= levels
