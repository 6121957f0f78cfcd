"""Models whose repeated blocks are compiled: nothing is left uncaptured, the output stays, the log tells."""

import logging
from functools import partial

import pytest
import tiny_bagel
import torch
import torch._dynamo.config
import torch._dynamo.utils
from tiny.chat import build_chat
from typer.testing import CliRunner

import quantkit.demo
from quantkit.cli.main import app
from quantkit.compare.result import read_result
from quantkit_runtime import W4A16Linear, compilation, load, load_model, load_pipeline
from quantkit_runtime.compilation import compile_model, compile_pipeline
from quantkit_runtime.errors import QuantkitRuntimeError
from quantkit_runtime.server.models import diffusion, loader
from quantkit_runtime.server.protocol import ChatRequest, Delta, ImageRequest, Message, ModelSpec, TextPart

LAYERS = 9  # more than dynamo would compile one function for


@pytest.fixture(autouse=True)
def counters():
    """Dynamo's counters, from zero."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=16):
        yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a red circle",
        height=32,
        width=32,
        num_inference_steps=2,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


def test_a_packed_pipeline_is_captured_block_by_block_and_draws_the_same(rtn_checkpoint, counters):
    pipeline = load_pipeline(rtn_checkpoint)
    assert any(isinstance(module, W4A16Linear) for module in pipeline.transformer.modules())
    wanted = draw(pipeline)
    compile_pipeline(pipeline, backend="eager")
    assert torch.equal(draw(pipeline), wanted)
    assert not counters["graph_break"]
    # Two classes of blocks, and the first single block gets its input in other strides than the rest.
    assert 0 < counters["stats"]["unique_graphs"] <= 3
    for name in ("vae", "text_encoder", "text_encoder_2"):
        assert not any(module._compiled_call_impl for module in getattr(pipeline, name).modules())


@pytest.mark.parametrize("model", ["wan_t2v", "ovis_image", "glm_image"])
def test_the_blocks_of_every_family_are_captured(tiny_model, model, counters):
    pipeline = load_pipeline(tiny_model(model))
    compile_pipeline(pipeline, backend="eager")
    calls = {
        "wan_t2v": {"height": 32, "width": 32, "num_frames": 5},
        "ovis_image": {"height": 32, "width": 32},
        "glm_image": {"height": 64, "width": 64},
    }
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a red circle", num_inference_steps=2, output_type="latent", **calls[model])
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] > 0


def test_a_model_that_is_loaded_compiled_computes_the_same_by_inductor(rtn_checkpoint, caplog):
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "hidden_states": torch.randn(1, 16, 16, generator=generator).to(torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, 8, 64, generator=generator).to(torch.bfloat16),
        "pooled_projections": torch.randn(1, 32, generator=generator).to(torch.bfloat16),
        "timestep": torch.tensor([0.7], dtype=torch.bfloat16),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(8, 3),
    }
    folder = rtn_checkpoint / "transformer"
    with torch.inference_mode():
        wanted = load_model(folder)(**inputs).sample.float()
        with caplog.at_level(logging.INFO, logger="quantkit_runtime"):
            model = load_model(folder, compile=True)
            found = model(**inputs).sample.float()
            model(**inputs)
    assert (found - wanted).norm() / wanted.norm() < 1e-2
    told = [record.getMessage() for record in caplog.records if record.name == "quantkit_runtime"]
    assert "FluxTransformer2DModel: 2 x FluxTransformerBlock" in told[0]
    assert "compiling its blocks" in told[1]
    assert "graphs compiled, " in told[2]
    assert len(told) == 3  # the second call compiles nothing


def test_a_comparison_of_compiled_models_says_so_while_it_runs_and_in_its_result(
    flux_model, rtn_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(load, "compile_pipeline", partial(compile_pipeline, backend="eager"))
    flags = "--height 32 --width 32 --num-inference-steps 2 --max-sequence-length 16 --no-noise-floor --compile"
    command = ["compare", "--task", "t2i", "--reference", flux_model, "--candidate", rtn_checkpoint]
    command += ["--prompt", "a red circle", *flags.split(), "--output", tmp_path / "report"]
    finished = CliRunner().invoke(app, list(map(str, command)))
    assert finished.exit_code == 0, finished.output
    assert "note: transformer: compiling its blocks" in finished.stderr
    assert read_result(tmp_path / "report").compiled
    assert ", compiled" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("can_isolate", [True, False])
def test_decoder_layers_of_a_language_model_are_compiled_however_many_there_are(counters, monkeypatch, can_isolate):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if can_isolate and not compilation._can_isolate():
        pytest.skip("this torch cannot keep what it compiles apart")
    monkeypatch.setattr(compilation, "_can_isolate", lambda: can_isolate)

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_hidden_layers=LAYERS, **sizes)).eval()
    prompt = torch.arange(7)[None]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(prompt, **options)
    compile_model(model, backend="eager")
    assert torch.equal(model.generate(prompt, **options), wanted)
    assert not counters["graph_break"]
    assert LAYERS <= counters["stats"]["unique_graphs"] <= 4 * LAYERS


def test_bagel_draws_the_same_compiled_however_many_layers_it_has(counters, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny_bagel.LLM_CONFIG, "num_hidden_layers", LAYERS)
    pipeline = load_pipeline(tiny_bagel.build_bagel(tmp_path / "bagel"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def picture(prompt):
        return pipeline(prompt, 32, 32, 3, generator=torch.Generator().manual_seed(0), output_type="latent").images

    prompts = ["draw a red circle", "blue"]
    wanted = [picture(prompt) for prompt in prompts]
    compile_pipeline(pipeline, backend="eager")
    for prompt, expected in zip(prompts, wanted, strict=True):
        torch.testing.assert_close(picture(prompt), expected, rtol=1e-5, atol=1e-5)
    assert not counters["graph_break"]
    # Prompts are read with a cache that fills, pictures beside one that is full, or without one.
    assert LAYERS <= counters["stats"]["unique_graphs"] <= 4 * LAYERS


def test_a_model_without_repeated_blocks_is_refused_in_one_line():
    with pytest.raises(QuantkitRuntimeError, match=r"CLIPTextModel: has no blocks of class .*DecoderLayer"):
        load_model(quantkit.demo.path() / "text_encoder", compile=True)


def test_a_compiled_pipeline_is_served_warm_in_the_size_that_requests_have(tiny_model, monkeypatch, counters):
    monkeypatch.setattr(load, "compile_pipeline", partial(compile_pipeline, backend="eager"))
    model = diffusion.load(ModelSpec(path=str(tiny_model("ovis_image")), compile=True))
    model.set_defaults({"width": 96, "height": 64})
    model.warm_up()
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    options = {name: model.info.defaults[name] for name in ("max_sequence_length",) if name in model.info.defaults}
    request = ImageRequest("a", "", (1,), 96, 64, {"num_inference_steps": 2, **options}, negative_prompt="")
    model.run([request], lambda _step, _steps: None)
    assert counters["stats"]["unique_graphs"] == compiled


def test_a_compiled_chat_model_gives_the_same_answers_at_once(tmp_path, monkeypatch, counters):
    folder = str(build_chat(tmp_path / "chat"))
    monkeypatch.setattr(load, "compile_model", partial(compile_model, backend="eager"))
    answers = []
    for compiled in (False, True):
        model = loader.load(ModelSpec(path=folder, dtype="float32", compile=compiled))
        for words in (1, 2, 3):
            messages = (Message("user", (TextPart("red " * words),)),)
            model.admit(ChatRequest(str(words), messages, max_tokens=8, temperature=0))
        texts = dict.fromkeys("123", "")
        while model.active:
            for event in model.step():
                if isinstance(event, Delta):
                    texts[event.id] += event.text
        answers.append(texts)
    assert counters["stats"]["unique_graphs"] > 0
    assert answers[0] == answers[1]


def test_recorded_steps_are_for_models_that_draw(tmp_path):
    folder = str(build_chat(tmp_path / "chat"))
    with pytest.raises(QuantkitRuntimeError, match=r"--cuda-graphs: .* is a chat model, which has no denoising"):
        loader.load(ModelSpec(path=folder, cuda_graphs=True))
