"""BAGEL from a 16-bit folder to a packed model that runs."""

import base64
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest
import serving
import tiny_bagel
import torch
from interrupted import interrupted_and_resumed
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantkit.checkpoint import open_model
from quantkit.cli.main import app, main
from quantkit.errors import CheckpointError
from quantkit.quantize import tuning
from quantkit.quantize.run import prepare, quantize
from quantkit.quantize.verify import verify
from quantkit.recipe import load_recipe
from quantkit_runtime import load_model, load_pipeline
from quantkit_runtime.config import Scheme
from quantkit_runtime.format import dequantize, pack
from quantkit_runtime.generation.batch import write_greedily
from quantkit_runtime.linear import W4A16Linear
from quantkit_runtime.models.bagel_processor import BagelProcessor
from quantkit_runtime.rounding import quantize_rtn
from quantkit_runtime.server.protocol import ModelSpec
from quantkit_runtime.server.settings import Settings

RECIPE = Path(__file__).parents[2] / "recipes" / "bagel.yaml"
BLOCKS = "language_model.model.layers"
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
UNDERSTANDING = {
    f"{BLOCKS}.{number}.{part}"
    for number in range(2)
    for part in (*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.{name}" for name in MLP))
}
DRAWING = {
    f"{BLOCKS}.{number}.{part}"
    for number in range(2)
    for part in (*(f"self_attn.{name}_moe_gen" for name in ATTENTION), *(f"mlp_moe_gen.{name}" for name in MLP))
}
SCHEME = Scheme(4, 64, True)
TUNED = ["scheme.iters=6", "scheme.lr=0.02", "scheme.nsamples=3", "scheme.batch_size=1"]
SMALL = ["--height", "32", "--width", "32"]
TEXTS = ["what is on the left", "draw a red circle on the right", "a black square is on the white square"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_bagel.build_bagel(tmp_path_factory.mktemp("models") / "tiny-bagel")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    """Quantize the tiny model in groups of 64: ``run(*overrides, source=...)``; returns the checkpoint."""

    def quantize_with(*overrides, source=source):
        output = tmp_path_factory.mktemp("checkpoints") / "out"
        recipe = load_recipe(RECIPE, ["scheme.group_size=64", *overrides])
        return quantize(prepare(recipe, source), output).output

    return quantize_with


@pytest.fixture(scope="module")
def rounded(run):
    return run()


@pytest.fixture(scope="module")
def tuned(run, tmp_path_factory):
    """A tuned checkpoint, and what the second block got meanwhile."""
    folder = tmp_path_factory.mktemp("tuning")
    (folder / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    started = subprocess.Popen

    def start(command, **kwargs):
        assert command[1:3] == ["-m", "quantkit.quantize.autoround"]
        recorder = Path(__file__).parent / "bagel_recorder.py"
        return started([command[0], str(recorder), *command[3:]], **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning.subprocess, "Popen", start)
        patch.setenv("BAGEL_RECORD", str(folder / "seen.pt"))
        checkpoint = run(*TUNED, "calibration.dataset=null", f"calibration.prompts={folder / 'texts.txt'}")
    return checkpoint, torch.load(folder / "seen.pt")


def tensors(folder):
    return {**load_file(folder / "ema.safetensors"), **load_file(folder / "ae.safetensors")}


def packed(folder):
    return {name.removesuffix(".qweight") for name in tensors(folder) if name.endswith(".qweight")}


def test_the_understanding_expert_is_planned_and_nothing_else(source):
    (part,) = prepare(load_recipe(RECIPE, ["scheme.group_size=64"]), source).plan.components
    assert {layer.name for layer in part.layers} == UNDERSTANDING
    kept = dict(part.kept)
    assert {name for name in kept if name.startswith(BLOCKS)} == DRAWING
    assert all("drawing expert" in kept[name] for name in DRAWING)
    assert kept.keys() >= {"connector.fc1", "connector.fc2", "vae2llm", "llm2vae", "language_model.lm_head"}


@pytest.mark.parametrize("kind", ["rounded", "tuned"])
def test_all_that_is_not_planned_is_bit_equal_to_the_source(source, kind, request):
    found = request.getfixturevalue(kind)
    checkpoint = found if kind == "rounded" else found[0]
    before, after = tensors(source), tensors(checkpoint)
    assert packed(checkpoint) == UNDERSTANDING
    untouched = before.keys() - {f"{name}.weight" for name in UNDERSTANDING}
    assert untouched == {name for name in after if not name.endswith((".qweight", ".qzeros", ".scales"))}
    for name in untouched:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name]), name
    assert verify(checkpoint, source=source).problems == []


def test_the_layout_is_that_of_the_source(source, rounded):
    assert (rounded / "ae.safetensors").samefile(source / "ae.safetensors")
    assert {path.name for path in source.iterdir()} <= {path.name for path in rounded.iterdir()}
    weight_map = json.loads((rounded / "model.safetensors.index.json").read_text())["weight_map"]
    for file in ("ema.safetensors", "ae.safetensors"):
        assert {name for name, where in weight_map.items() if where == file} == load_file(rounded / file).keys()


def test_the_root_configuration_tells_loaders_what_is_packed(source, rounded):
    config = json.loads((rounded / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert quantization["block_name_to_quantize"] == BLOCKS
    assert quantization["extra_config"].keys() == DRAWING
    assert {entry["bits"] for entry in quantization["extra_config"].values()} == {16}


def test_the_card_says_how_to_load_a_single_model(rounded):
    card = (rounded / "README.md").read_text()
    assert "load_model(" in card
    assert "diffusers" not in card
    assert "library_name" not in card


@torch.no_grad()
def test_a_packed_model_computes_what_its_dequantized_weights_do(source, rounded, shows):
    model, reference = load_model(rounded), load_model(source)
    stored = tensors(rounded)
    layers = {name for name, module in model.named_modules() if isinstance(module, W4A16Linear)}
    assert layers == UNDERSTANDING
    for name in layers:
        parts = {suffix: stored[f"{name}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")}
        reference.get_submodule(name).weight.data = dequantize(parts, SCHEME, torch.bfloat16)
    ids = torch.randint(19, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = reference(ids).float()
    difference = (model(ids).float() - expected).abs().max() / expected.abs().max()
    assert difference < 2**-6
    shows("bagel", "rtn", "load")


@torch.no_grad()
@pytest.mark.parametrize("indexed", [True, False])
def test_a_16_bit_model_loads_with_and_without_an_index(tmp_path, indexed):
    folder = tiny_bagel.build_bagel(tmp_path / "model", indexed=indexed)
    model = load_model(folder, dtype=torch.float32)
    ids = torch.randint(19, (1, 12), generator=torch.Generator().manual_seed(0))
    exact = tiny_bagel.random_model().to(torch.bfloat16).float()
    torch.testing.assert_close(model(ids), exact(ids))


def test_a_copy_without_an_index_gets_one(run, tmp_path):
    source = tiny_bagel.build_bagel(tmp_path / "model", indexed=False)
    checkpoint = run(source=source)
    assert (checkpoint / "ae.safetensors").samefile(source / "ae.safetensors")
    assert set(json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"].values()) == {
        "ema.safetensors",
        "ae.safetensors",
    }
    assert verify(checkpoint, source=source).problems == []


def test_a_large_model_is_cut_into_shards_beside_its_vae(run, source):
    checkpoint = run("export.max_shard_size=300KB")
    shards = {path.name for path in checkpoint.glob("*.safetensors")}
    assert len(shards) > 2
    assert all(name == "ae.safetensors" or name.startswith("ema-0000") for name in shards)
    assert verify(checkpoint, source=source).problems == []
    assert load_model(checkpoint).config.text.num_hidden_layers == 2


def test_a_changed_vae_is_found(rounded, source, tmp_path):
    checkpoint = shutil.copytree(rounded, tmp_path / "changed")
    vae = load_file(checkpoint / "ae.safetensors")
    vae["decoder.conv_in.bias"][0] += 1
    (checkpoint / "ae.safetensors").unlink()
    save_file(vae, checkpoint / "ae.safetensors")
    problems = verify(checkpoint, source=source).problems
    assert any("decoder.conv_in.bias: differs from the source" in problem for problem in problems)


def test_tuning_moves_weights_of_the_understanding_expert(rounded, tuned, shows):
    before, after = tensors(rounded), tensors(tuned[0])
    moved = {name for name in UNDERSTANDING if not torch.equal(before[f"{name}.qweight"], after[f"{name}.qweight"])}
    assert len(moved) > len(UNDERSTANDING) / 2
    shows("bagel", "tuned")


def test_a_run_that_fails_goes_on_after_the_last_block_and_ends_with_the_same_bytes(source, tuned, tmp_path, shows):
    prompts = tmp_path / "texts.txt"
    prompts.write_text("\n".join(TEXTS), encoding="utf-8")
    overrides = ["scheme.group_size=64", *TUNED, "calibration.dataset=null", f"calibration.prompts={prompts}"]
    prepared = prepare(load_recipe(RECIPE, overrides), source)
    result = interrupted_and_resumed(prepared, tmp_path / "out")
    for name in ("ema.safetensors", "ae.safetensors"):
        assert (result.output / name).read_bytes() == (tuned[0] / name).read_bytes()
    shows("bagel", "resume")


@torch.no_grad()
def test_calibration_sees_the_normed_queries_and_keys(source, tuned):
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    exact = tiny_bagel.qwen3(load_model(source, dtype=torch.float32))
    # The same without q_norm and k_norm.
    wrong = Qwen2ForCausalLM(tiny_bagel.qwen2_config(exact.config)).eval()
    wrong.load_state_dict(
        {name: tensor for name, tensor in exact.state_dict().items() if name in wrong.state_dict()}
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    begin, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    for text in TEXTS:
        ids = torch.tensor([[begin, *tokenizer(text)["input_ids"], end]])
        expected, without = (model(ids, output_hidden_states=True).hidden_states[1] for model in (exact, wrong))
        seen = [states.float() for states in tuned[1] if states.shape == expected.shape]
        error = min(float((states - expected).norm() / expected.norm()) for states in seen)
        fault = float((without - expected).norm() / expected.norm())
        assert error < 0.01
        assert fault > 5 * error


def test_a_recipe_that_names_the_drawing_expert_quantizes_it_too(run, source, tuned, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    texts = ["calibration.dataset=null", f"calibration.prompts={tmp_path / 'texts.txt'}"]
    checkpoint = run(*TUNED, *texts, f'layers.include=["{BLOCKS}.*"]')
    assert packed(checkpoint) == UNDERSTANDING | DRAWING
    assert "extra_config" not in json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    before, after = tensors(source), tensors(checkpoint)
    for name in DRAWING:  # no text reaches them: they are rounded to nearest
        expected = pack(*quantize_rtn(before[f"{name}.weight"], SCHEME), SCHEME)
        for suffix, tensor in expected.items():
            assert torch.equal(after[f"{name}.{suffix}"], tensor), name
    for name in UNDERSTANDING:
        assert torch.equal(after[f"{name}.qweight"], tensors(tuned[0])[f"{name}.qweight"]), name


@pytest.mark.timeout(120)
def test_a_data_set_that_auto_round_reads_calibrates_too(run, source, tmp_path):
    # auto-round prepares data sets in a fork of its process; it must not wait for a lock of ours.
    lines = [json.dumps({"text": f"{TEXTS[0]} {TEXTS[1]} {TEXTS[2]}"}) for _ in range(3)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    checkpoint = run(*TUNED, "scheme.seqlen=8", f"calibration.dataset={tmp_path / 'texts.jsonl'}")
    assert packed(checkpoint) == UNDERSTANDING
    assert verify(checkpoint, source=source).problems == []


def test_the_commands_need_no_option_of_their_own(source, rounded):
    cli = CliRunner()
    planned = cli.invoke(
        app, ["quantize", "--recipe", "bagel", "--model", str(source), "--set", "scheme.group_size=64", "--dry-run"]
    )
    assert planned.exit_code == 0, planned.output
    assert "14" in planned.output
    inspected = cli.invoke(app, ["inspect", str(rounded)])
    assert inspected.exit_code == 0, inspected.output
    verified = cli.invoke(app, ["verify", str(rounded), "--source", str(source)])
    assert verified.exit_code == 0, verified.output


def test_a_model_is_recognised_by_its_type_where_no_architecture_is_named(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_model(folder).class_name == "bagel"
    assert len(prepare(load_recipe(RECIPE, ["scheme.group_size=64"]), folder).plan.components[0].layers) == 14


def test_a_missing_or_foreign_configuration_is_named(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "model")
    llm = json.loads((folder / "llm_config.json").read_text())
    (folder / "llm_config.json").write_text(json.dumps({**llm, "intermediate_size": 512}))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight has shape \[128, 256\]"):
        prepare(load_recipe(RECIPE), folder)
    (folder / "llm_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"llm_config\.json: cannot be read"):
        prepare(load_recipe(RECIPE), folder)


@pytest.fixture
def command(monkeypatch, capfd):
    """Run ``quantkit``: ``code, standard output = command(...)``."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["quantkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, capfd.readouterr().out

    return run


def test_a_packed_model_answers_on_the_command_line(rounded, picture, command):
    options = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "6"]
    model, processor = load_model(rounded, dtype=torch.float32), BagelProcessor(rounded)
    writer = model.make_writer(processor.tokenizer)
    for more, seen in ([], []), (["--image", picture], [Image.open(picture)]):
        code, answer = command("generate", rounded, "--prompt", "what is on the left", *more, *options)
        assert code == 0
        inputs = processor([*seen, "what is on the left"])
        pieces = write_greedily(writer, processor.tokenizer, inputs, 6)
        assert answer.strip() == "".join(piece.text for piece in pieces).strip()


def test_a_packed_model_draws_on_the_command_line_what_the_pipeline_draws(rounded, tmp_path, command, shows):
    output = tmp_path / "drawn.png"
    options = ["--height", "32", "--width", "32", "--num-inference-steps", "3", "--seed", "4", "--device", "cpu"]
    code, _ = command("generate", rounded, "--prompt", "draw a red circle", "--output", output, *options)
    assert code == 0
    pipeline = load_pipeline(rounded)
    expected = pipeline("draw a red circle", 32, 32, 3, generator=torch.Generator().manual_seed(4)).images[0]
    assert np.array_equal(np.asarray(Image.open(output)), np.asarray(expected))
    shows("bagel", "generate")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--output", "x.png", "--height", "40"],
            "--height: is 40, but this bagel model draws multiples of 16; use",
        ),
        (["--output", "x.png", "--width", "80"], "--width: is 80, but this bagel model draws at most 64"),
        (["--output", "x.mp4"], "x.mp4: bagel writes .txt or .png or .jpg"),
        (["--height", "32"], "bagel takes no height (it takes max_new_tokens); to draw, give an image as --output"),
        (
            ["--cfg-parallel", "2"],
            "of pictures (--output x.png), bagel is guided with --guidance-scale above 1",
        ),
        ([*SMALL, "--output", "x.png", "--image", "PICTURE"], "--image: bagel draws from text alone"),
    ],
)
def test_what_it_does_not_do_is_refused_before_it_is_loaded(
    rounded, picture, options, message, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("quantkit_runtime.load_model", None)
    monkeypatch.setattr("quantkit_runtime.load_pipeline", None)
    options = [str(picture) if option == "PICTURE" else option for option in options]
    monkeypatch.setattr(sys, "argv", ["quantkit", "generate", str(rounded), "--prompt", "x", *options])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_packed_model_is_compared_by_its_answers_and_by_its_pictures(source, rounded, tmp_path, command, shows):
    both = ["--reference", source, "--candidate", rounded, "--device", "cpu"]
    code, _ = command("compare", "--task", "chat", *both, "--prompt", "what is on the left", "--output",
                      tmp_path / "chat", "--max-new-tokens", "8")  # fmt: skip
    assert code == 0
    answers = json.loads((tmp_path / "chat" / "result.json").read_text())
    assert 0 < answers["metrics"]["token_kl"]["value"] < 1
    code, _ = command("compare", "--task", "t2i", *both, "--prompt", "draw a red circle", "--height", "32",
                      "--width", "32", "--num-inference-steps", "4", "--output", tmp_path / "t2i")  # fmt: skip
    assert code == 0
    pictures = json.loads((tmp_path / "t2i" / "result.json").read_text())
    assert 0 < pictures["metrics"]["latent_rel_l2"]["value"] < 0.5
    assert len(pictures["items"][0]["curves"]["latent_rel_l2"]) == 4
    shows("bagel", "compare")


def test_an_answer_and_a_picture_come_from_one_server_at_the_same_time(rounded, picture, tmp_path):
    settings = Settings(
        models={"bagel": ModelSpec(path=str(rounded), dtype="float32")},
        port=0,
        state_dir=tmp_path,
        log_format="text",
    )
    encoded = base64.b64encode(Path(picture).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "text", "text": "what is on the left"},
    ]
    draw = {"prompt": "draw a red circle", "size": "32x32", "extra_body": {"num_inference_steps": 8, "seed": 4}}
    with (
        serving.running(settings) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):

        def ask(tokens=20):
            answer = client.chat.completions.create(
                model="bagel", messages=[{"role": "user", "content": content}], max_tokens=tokens, temperature=0
            )
            # 8 patches in 2 marks, 5 words in 2 marks, and the mark that begins the answer.
            assert answer.usage.prompt_tokens == 8 + 2 + 5 + 2 + 1
            return answer.choices[0].message.content

        def drawn():
            return client.images.generate(model="bagel", **draw).data[0].b64_json

        answer, image = ask(), drawn()
        assert answer
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask) for _ in range(2)]
            made = [pool.submit(drawn) for _ in range(2)]
            assert [one.result() for one in made] == [image] * 2
            assert [one.result() for one in asked] == [answer] * 2
        with pytest.raises(openai.BadRequestError, match="multiples of 16"):
            client.images.generate(model="bagel", prompt="x", size="40x32")
        with pytest.raises(openai.BadRequestError, match="up to 64"):
            client.images.generate(model="bagel", prompt="x", size="80x32")
        assert drawn() == image
