"""How BAGEL draws, against its authors' algorithm written out without a cache."""

import dataclasses

import numpy as np
import pytest
import tiny_bagel
import torch
from safetensors.torch import load_file, save_file

from quantkit_runtime import load_pipeline
from quantkit_runtime.errors import CheckpointFormatError
from quantkit_runtime.models.flux_vae import read_flux_vae

PROMPT = "draw a red circle on the left"
ROWS, COLUMNS = 2, 4
SIDE = 4  # of the tiny model's largest picture, in tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_bagel.build_bagel(tmp_path_factory.mktemp("bagel") / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def pipeline(folder):
    pipeline = load_pipeline(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise():
    return torch.randn(1, ROWS * COLUMNS, 64, generator=torch.Generator().manual_seed(5))


def draw(pipeline, **arguments):
    given = {"prompt": PROMPT, "height": 32, "width": 64, "num_inference_steps": 7, "latents": noise()}
    return pipeline(**(given | {"output_type": "latent"} | arguments)).images


def velocity(pipeline, latents, time, prompt):
    """Run prompt and latents through the decoder in one sequence; ``prompt`` is None for the branch without."""
    bagel, marks = pipeline.transformer.bagel, pipeline.processor.marks
    language = bagel.language_model.model
    tokens = []
    if prompt is not None:
        tokens = [marks[0], *pipeline.processor.tokenizer.encode(prompt, add_special_tokens=False), marks[1]]
    places = torch.tensor([row * SIDE + column for row in range(ROWS) for column in range(COLUMNS)])
    drawn = (
        bagel.vae2llm(latents) + bagel.time_embedder(torch.tensor([time]))[:, None] + bagel.latent_pos_embed(places)
    )
    read = language.embed_tokens(torch.tensor([[*tokens, marks[2], marks[3]]]))
    sequence = torch.cat([read[:, :-1], drawn, read[:, -1:]], dim=1)
    count, before = sequence.shape[1], len(tokens)
    mask = torch.ones(count, count, dtype=torch.bool).tril()
    mask[before:] = True
    is_latent = torch.zeros(1, count, dtype=torch.bool)
    is_latent[:, before + 1 : -1] = True
    positions = torch.tensor([[*range(before), *[before] * (count - before)]])
    hidden = language(sequence, positions=positions, attention_mask=mask[None, None], latent=is_latent)
    return bagel.llm2vae(hidden[is_latent])[None]


@torch.no_grad()
@pytest.mark.parametrize(("scale", "interval"), [(1.0, (0.4, 1.0)), (4.0, (0.4, 1.0)), (6.0, (0.0, 1.0))])
def test_a_picture_is_drawn_as_by_the_authors(pipeline, scale, interval):
    steps, shift = 7, 3.0
    points = torch.linspace(1, 0, steps + 1)
    points = shift * points / (1 + (shift - 1) * points)
    latents = noise()
    for time, following in zip(points[:-1].tolist(), points[1:].tolist(), strict=True):
        speed = velocity(pipeline, latents, time, PROMPT)
        if scale > 1 and interval[0] < time <= interval[1]:
            without = velocity(pipeline, latents, time, None)
            guided = without + scale * (speed - without)
            speed = guided * min(float(speed.norm() / (guided.norm() + 1e-8)), 1.0)
        latents = latents - speed * (time - following)
    found = draw(pipeline, guidance_scale=scale, guidance_interval=interval)
    torch.testing.assert_close(found, latents, rtol=1e-3, atol=1e-3)


def test_prompt_seed_and_guidance_make_the_picture(pipeline):
    first = draw(pipeline)
    assert torch.equal(draw(pipeline), first)
    assert not torch.allclose(draw(pipeline, guidance_scale=1.0), first, atol=1e-3)
    assert not torch.allclose(draw(pipeline, prompt="blue square"), first, atol=1e-3)
    seeds = [draw(pipeline, latents=None, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.allclose(seeds[0], seeds[2], atol=1e-2)


def test_guidance_runs_the_model_twice_inside_of_its_interval_alone(pipeline):
    calls = []
    hook = pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    try:
        draw(pipeline)
        # Times of 7 steps are 1, .95, .88, .8, .69, .55, .33.
        assert len(calls) == 7 + 6
        calls.clear()
        draw(pipeline, guidance_scale=1.0)
        assert len(calls) == 7
    finally:
        hook.remove()


def test_latents_become_pixels_in_their_places(pipeline):
    latents = draw(pipeline)
    grid = torch.zeros(1, 16, 2 * ROWS, 2 * COLUMNS)
    for token in range(ROWS * COLUMNS):
        row, column = divmod(token, COLUMNS)
        patch = latents[0, token].view(2, 2, 16).permute(2, 0, 1)
        grid[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patch
    pixels = pipeline.vae.decode(grid / 0.3611 + 0.1159).sample
    expected = (pixels[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(draw(pipeline, output_type="np")[0], expected, atol=1e-5)
    [image] = draw(pipeline, output_type="pil")
    assert image.size == (64, 32)


def test_callbacks_see_and_change_the_latents_of_every_step(pipeline):
    seen = []

    def look(_pipeline, index, timestep, tensors):
        seen.append((index, float(timestep), tensors["latents"]))
        return {}

    last = draw(pipeline, callback_on_step_end=look)
    assert [index for index, _, _ in seen] == list(range(7))
    assert seen[0][1] == 1000
    assert torch.equal(seen[-1][2], last)
    zero = draw(pipeline, callback_on_step_end=lambda *_: {"latents": torch.zeros(1, 8, 64)})
    assert not zero.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 40}, "height: must be a multiple of 16 up to 64, not 40"),
        ({"width": 80}, "width: must be a multiple of 16 up to 64, not 80"),
        ({"prompt": ["a", "b"]}, "prompt: one picture at a time, not 2"),
        ({"prompt": []}, "prompt: one picture at a time, not 0"),
        ({"num_inference_steps": 0}, "num_inference_steps: must be at least 1, not 0"),
        ({"latents": torch.zeros(1, 4, 64)}, r"latents: must have shape \(1, 8, 64\), not \(1, 4, 64\)"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "knows latents alone, not prompt_embeds"),
    ],
)
def test_what_it_cannot_draw_is_refused(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**{"prompt": PROMPT, "height": 32, "width": 64, "num_inference_steps": 1, **arguments})


def test_a_prompt_beyond_the_context_is_refused(pipeline, monkeypatch):
    text = dataclasses.replace(pipeline.transformer.bagel.config.text, max_position_embeddings=8)
    config = dataclasses.replace(pipeline.transformer.bagel.config, text=text)
    monkeypatch.setattr(pipeline.transformer.bagel, "config", config)
    draw(pipeline, prompt="red red red red red")
    with pytest.raises(ValueError, match="prompt: 8 tokens; the model reads at most 7"):
        draw(pipeline, prompt="red red red red red red")


def test_it_tells_its_device_and_does_not_pretend_to_be_saved(pipeline, tmp_path):
    assert pipeline.device == torch.device("cpu")
    with pytest.raises(NotImplementedError, match="copy the folder"):
        pipeline.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_the_published_autoencoder_becomes_that_of_diffusers(folder):
    expected = tiny_bagel.random_vae()
    found = read_flux_vae(folder / "ae.safetensors", torch.float32)
    assert found.config.block_out_channels == [32] * 4
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_an_autoencoder_of_another_kind_is_one_clear_error(folder, tmp_path):
    tensors = load_file(folder / "ae.safetensors")
    del tensors["encoder.mid.attn_1.q.weight"]
    path = tmp_path / "ae.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointFormatError, match=r"ae\.safetensors: is no autoencoder of FLUX"):
        read_flux_vae(path, torch.float32)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointFormatError, match=r"ae\.safetensors: is no autoencoder of FLUX"):
        read_flux_vae(path, torch.float32)
    path.unlink()
    with pytest.raises(CheckpointFormatError, match=r"ae\.safetensors"):
        read_flux_vae(path, torch.float32)
