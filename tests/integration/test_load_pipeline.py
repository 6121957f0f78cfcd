"""Loading what AutoRound wrote, without AutoRound.

auto-round patches transformers when it is imported, so it only ever runs in a process of its own.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build_flux

from quantkit_runtime import W4A16Linear, load_model, load_pipeline
from quantkit_runtime.errors import (
    BackendUnavailableError,
    CheckpointFormatError,
    MissingDependencyError,
    QuantkitRuntimeError,
)
from quantkit_runtime.format import QuantizationConfig, Scheme, dequantize, pack
from quantkit_runtime.rounding import quantize_rtn

GROUP_SIZE = 64
VARIANTS = [(4, True), (4, False), (2, True), (3, True), (8, True)]

QUANTIZE = f"""
import sys
import torch
torch.set_num_threads(2)
from auto_round import AutoRound
for bits, sym in {VARIANTS!r}:
    AutoRound(
        sys.argv[1], scheme="W4A16", bits=bits, sym=sym, group_size={GROUP_SIZE}, low_cpu_mem_usage=False,
        seed=1, iters=0, disable_opt_rtn=True, disable_model_free=True, enable_torch_compile=False,
    ).quantize_and_save(f"{{sys.argv[2]}}/{{bits}}-{{sym}}", format="auto_round")
"""

LOAD_WITH_AUTO_ROUND = """
import sys
import torch
import auto_round  # its loader is registered on import
from diffusers import FluxTransformer2DModel
model = FluxTransformer2DModel.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
inputs = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(model(**inputs).sample, sys.argv[3])
"""


def run_python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A random FLUX pipeline in bf16."""
    return build_flux(tmp_path_factory.mktemp("source") / "flux")


@pytest.fixture(scope="module")
def exports(source, tmp_path_factory):
    """What auto-round's plain RTN writes for each variant, by (bits, sym)."""
    folder = tmp_path_factory.mktemp("exports")
    run_python(QUANTIZE, source, folder)
    return {variant: folder / f"{variant[0]}-{variant[1]}" for variant in VARIANTS}


@pytest.fixture(scope="module")
def checkpoint(exports):
    """The 4-bit symmetric export."""
    return exports[4, True]


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(1, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, 64, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([0.7]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(8, 3),
    }


def forward(model, inputs, dtype):
    cast = {name: tensor if name.endswith("_ids") else tensor.to(dtype) for name, tensor in inputs.items()}
    with torch.no_grad():
        return model(**cast).sample


def nibbles(words, axis):
    """4-bit codes of int32 words, by arithmetic that shares nothing with the code under test."""
    unsigned = words.astype(np.int64) % 2**32
    return np.stack([unsigned // 16**position % 16 for position in range(8)], axis + 1).reshape(
        [size * 8 if dimension == axis else size for dimension, size in enumerate(words.shape)]
    )


def dense_state(folder):
    """Float64 state dict of a 4-bit gptq checkpoint, packed weights decoded independently."""
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    state = {}
    for name, tensor in stored.items():
        layer, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            codes = nibbles(tensor.numpy(), 0)
            zeros = nibbles(stored[f"{layer}.qzeros"].numpy(), 1) + 1
            scales = stored[f"{layer}.scales"].numpy().astype(np.float64)
            weight = (codes - zeros.repeat(GROUP_SIZE, 0)) * scales.repeat(GROUP_SIZE, 0)
            state[f"{layer}.weight"] = torch.from_numpy(weight.T.copy())
        elif suffix not in ("qzeros", "scales"):
            state[name] = tensor.double()
    return state


def dense_model(source, checkpoint, dtype):
    """diffusers' own model with the dequantized weights."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(source / "transformer"))
    state = {name: tensor.to(dtype) for name, tensor in dense_state(checkpoint).items()}
    model.load_state_dict(state, assign=True)
    return model


def relative_error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


def test_the_packed_transformer_is_as_exact_as_the_dequantized_one(source, checkpoint, inputs):
    exact = forward(dense_model(source, checkpoint, torch.float64), inputs, torch.float64)
    dense_error = relative_error(
        forward(dense_model(source, checkpoint, torch.bfloat16), inputs, torch.bfloat16), exact
    )
    for backend in ("reference", "cpu"):
        model = load_model(checkpoint / "transformer", backend=backend)
        error = relative_error(forward(model, inputs, torch.bfloat16), exact)
        assert error < 1.25 * dense_error < 0.05
        in_float32 = load_model(checkpoint / "transformer", dtype=torch.float32, backend=backend)
        assert relative_error(forward(in_float32, inputs, torch.float32), exact) < 1e-5


def test_the_reference_backend_equals_the_dequantized_model_bit_for_bit(source, checkpoint, inputs):
    dense = forward(dense_model(source, checkpoint, torch.bfloat16), inputs, torch.bfloat16)
    packed = forward(load_model(checkpoint / "transformer", backend="reference"), inputs, torch.bfloat16)
    assert torch.equal(packed, dense)


def test_the_result_is_that_of_diffusers_with_auto_round(checkpoint, inputs, tmp_path):
    cast = {name: t if name.endswith("_ids") else t.to(torch.bfloat16) for name, t in inputs.items()}
    torch.save(cast, tmp_path / "in.pt")
    run_python(LOAD_WITH_AUTO_ROUND, checkpoint / "transformer", tmp_path / "in.pt", tmp_path / "out.pt")
    theirs = torch.load(tmp_path / "out.pt").double()
    ours = forward(load_model(checkpoint / "transformer", backend="reference"), inputs, torch.bfloat16)
    assert relative_error(ours, theirs) < 0.01


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_quantize_rtn_writes_what_auto_round_writes(source, exports, variant):
    config = json.loads((exports[variant] / "transformer" / "config.json").read_text())
    quantization = QuantizationConfig.from_dict(config["quantization_config"])
    original = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    stored = load_file(exports[variant] / "transformer" / "diffusion_pytorch_model.safetensors")
    packed = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    assert len(packed) == 40
    for name in packed:
        scheme = quantization.scheme_for(name)
        assert (scheme.bits, scheme.sym, scheme.group_size) == (*variant, GROUP_SIZE)
        for suffix, tensor in pack(*quantize_rtn(original[f"{name}.weight"], scheme), scheme).items():
            assert torch.equal(stored[f"{name}.{suffix}"], tensor), (name, suffix)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_loads_and_runs(exports, variant, inputs):
    out = forward(load_model(exports[variant] / "transformer"), inputs, torch.bfloat16)
    assert torch.isfinite(out).all()


def test_the_state_dict_is_the_file_bit_for_bit(checkpoint):
    model = load_model(checkpoint / "transformer")
    stored = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    state = model.state_dict()
    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)
    packed = {name for name, module in model.named_modules() if isinstance(module, W4A16Linear)}
    assert packed == {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}


def generate(pipeline, seed=0):
    return pipeline(
        prompt="a red circle",
        height=16,
        width=16,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images


def test_a_quantized_pipeline_generates_close_to_its_original(source, checkpoint):
    images = {}
    for name, folder in (("original", source), ("packed", checkpoint)):
        pipeline = load_pipeline(folder)
        pipeline.set_progress_bar_config(disable=True)
        assert type(pipeline).__name__ == "FluxPipeline"
        images[name] = generate(pipeline)
        assert torch.isfinite(images[name]).all()
        assert torch.equal(generate(pipeline), images[name])
        assert not torch.equal(generate(pipeline, seed=1), images[name])
    assert 0 < (images["packed"] - images["original"]).abs().mean() < 0.1


def test_loading_does_not_import_auto_round(checkpoint):
    code = (
        "import sys; from quantkit_runtime import load_pipeline; load_pipeline(sys.argv[1]); "
        "print(sorted(name for name in ('auto_round', 'quantkit', 'triton') if name in sys.modules))"
    )
    assert "auto_round" not in run_python(code, checkpoint)


def test_a_16_bit_pipeline_loads_unchanged(source):
    pipeline = load_pipeline(source)
    stored = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(pipeline.transformer.state_dict()[name], tensor) for name, tensor in stored.items())


def test_shards_and_auto_rounds_own_file_name_load_the_same(checkpoint, tmp_path, inputs):
    expected = forward(load_model(checkpoint / "transformer"), inputs, torch.bfloat16)
    copied = shutil.copytree(checkpoint / "transformer", tmp_path / "renamed")
    (copied / "diffusion_pytorch_model.safetensors").rename(copied / "model.safetensors")
    assert torch.equal(forward(load_model(copied), inputs, torch.bfloat16), expected)

    stored = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    weight_map = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(stored)}
    for part in set(weight_map.values()):
        save_file({name: stored[name] for name in stored if weight_map[name] == part}, copied / part)
    index = {"metadata": {}, "weight_map": weight_map}
    (copied / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(forward(load_model(copied), inputs, torch.bfloat16), expected)


def pack_folder(folder, blocks, group_size=32):
    """Pack the Linear layers below ``blocks`` of a saved 16-bit model in place."""
    file = next(folder.glob("*.safetensors"))
    scheme = Scheme(group_size=group_size)
    state = {}
    for name, tensor in load_file(file).items():
        layer, _, suffix = name.rpartition(".")
        if name.startswith(blocks) and suffix == "weight" and tensor.ndim == 2 and "norm" not in layer:
            packed = pack(*quantize_rtn(tensor, scheme), scheme)
            state.update({f"{layer}.{key}": value for key, value in packed.items()})
        else:
            state[name] = tensor
    save_file(state, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "auto-round",
        "bits": 4,
        "group_size": group_size,
        "sym": True,
        "block_name_to_quantize": blocks,
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("stored", [False, True], ids=["computed", "stored, too"])
def test_modules_that_a_class_keeps_in_float32_stay_there_and_computed_buffers_are_right(tmp_path, stored):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=1,
        rope_max_seq_len=32,
    ).save_pretrained(tmp_path)
    original = WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    computed = [name for name, _ in original.named_buffers() if name not in original.state_dict()]
    assert computed
    pack_folder(tmp_path, "blocks")
    if stored:  # as older versions of a library do, and with other values
        [weights] = tmp_path.glob("*.safetensors")
        save_file(load_file(weights) | {name: torch.full((2,), float("nan")) for name in computed}, weights)
    packed = load_model(tmp_path)
    assert isinstance(packed.blocks[0].ffn.net[2], W4A16Linear)
    dtypes = {name: parameter.dtype for name, parameter in original.named_parameters()}
    assert torch.float32 in dtypes.values()
    for name, parameter in packed.named_parameters():
        assert parameter.dtype == dtypes[name], name
    for name in computed:
        assert torch.equal(packed.get_buffer(name), original.get_buffer(name)), name
        assert packed.get_buffer(name).dtype == original.get_buffer(name).dtype


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_with_tied_weights_equals_its_dequantized_self(tmp_path, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        eos_token_id=63,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    dense = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    pack_folder(tmp_path, "model.layers")
    packed = load_model(tmp_path, backend="reference")
    assert (packed.lm_head.weight is packed.model.embed_tokens.weight) is tied
    for name, module in packed.named_modules():
        if isinstance(module, W4A16Linear):
            weight = dequantize(module.packed(), module.scheme, torch.bfloat16)
            dense.get_submodule(name).weight.data = weight
    tokens = torch.arange(10).view(1, -1)
    with torch.no_grad():
        assert torch.equal(packed(tokens).logits, dense(tokens).logits)
    assert packed.generation_config.eos_token_id == 63
    (tmp_path / "generation_config.json").write_text("{damaged")
    with pytest.raises(CheckpointFormatError, match=r"generation_config.json: is not valid JSON"):
        load_model(tmp_path, backend="reference")


def edit_config(folder, **changes):
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


def edit_index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, edit):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = dict(load_file(path))
    edit(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


LAYER = "transformer_blocks.0.attn.to_q"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


BREAKAGES = {
    "no model_index.json": (lambda f: (f / "model_index.json").unlink(), "model_index.json: missing"),
    "component without library and class": (
        lambda f: edit_index(f, transformer=[]),
        r"model_index.json: transformer: is \[\], not a library and a class",
    ),
    "component folder gone": (lambda f: shutil.rmtree(f / "vae"), "vae: missing, though model_index.json"),
    "unknown quant_method": (
        lambda f: edit_config(f, quant_method="gptq"),
        r"transformer/config.json: quantization_config.quant_method: 'gptq'",
    ),
    "truncated packed weights": (
        lambda f: truncate(f / "transformer" / "diffusion_pytorch_model.safetensors"),
        "transformer/diffusion_pytorch_model.safetensors: is truncated: ",
    ),
    "truncated 16-bit weights": (
        lambda f: truncate(f / "text_encoder_2" / "model.safetensors"),
        "text_encoder_2/model.safetensors: is truncated: ",
    ),
    "other group size than stored": (
        lambda f: edit_config(f, group_size=32),
        r"qzeros|scales: has shape \(2, 128\) where FluxTransformer2DModel needs \(4, 128\)",
    ),
    "impossible group size": (lambda f: edit_config(f, group_size=48), "not divisible by group_size 48"),
    "missing packed tensor": (
        lambda f: edit_weights(f, lambda state: state.pop(f"{LAYER}.scales")),
        f"transformer: {LAYER}.scales: missing from the weights",
    ),
    "missing 16-bit tensor": (
        lambda f: edit_weights(f, lambda state: state.pop("proj_out.weight")),
        "transformer: proj_out.weight: missing from the weights",
    ),
    "unused tensor": (
        lambda f: edit_weights(f, lambda state: state.update(extra=torch.ones(1))),
        "extra: has no place in FluxTransformer2DModel",
    ),
    "16-bit twin": (
        lambda f: edit_weights(f, lambda state: state.update({f"{LAYER}.weight": torch.ones(128, 128)})),
        f"{LAYER}.weight: has no place",
    ),
    "wrong dtype": (
        lambda f: edit_weights(f, lambda state: state.update({f"{LAYER}.scales": torch.ones(2, 128)})),
        f"{LAYER}.scales: has dtype torch.float32 where torch.float16 is needed",
    ),
    "config claims a packed layer that is not": (
        lambda f: edit_config(f, block_name_to_quantize="transformer_blocks,single_transformer_blocks,proj_out"),
        "says that proj_out is packed, but the weights have no proj_out.qweight",
    ),
    "config denies a packed layer": (
        lambda f: edit_config(f, extra_config={LAYER: {"bits": 16}}),
        f"leaves {LAYER} in 16 bit, but .* holds it packed",
    ),
    "packed layer of another architecture": (
        lambda f: edit_weights(
            f,
            lambda state: state.update({"transformer_blocks.9.q.qweight": state[f"{LAYER}.qweight"].clone()}),
        ),
        "transformer_blocks.9.q: packed, but FluxTransformer2DModel has nothing there",
    ),
    "claim without packed layers": (
        lambda f: shutil.copy(
            f / "text_encoder" / "model.safetensors",
            f / "transformer" / "diffusion_pytorch_model.safetensors",
        ),
        "quantization_config: present, but the weights hold no packed layer",
    ),
    "no safetensors": (
        lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
        "vae: holds no safetensors weights",
    ),
    "text encoder in 16 bit without one of its weights": (
        lambda f: drop_tensor(f / "text_encoder" / "model.safetensors", "layer_norm1.weight"),
        "text_encoder: .*layer_norm1.weight: missing from the weights",
    ),
    "VAE without one of its weights": (
        lambda f: drop_tensor(f / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_in.bias"),
        "vae: decoder.conv_in.bias: missing from the weights",
    ),
    "packed weights that are not said to be packed": (
        lambda f: forget_quantization(f / "transformer" / "config.json"),
        "transformer/config.json: has no quantization_config, but the weights are packed; copy the checkpoint",
    ),
    "two quantization_configs that differ": (
        lambda f: (f / "transformer" / "config.json").write_text(
            json.dumps({"quantization_config": VALID_METADATA, "text": {"quantization_config": {"bits": 8}}})
        ),
        "transformer/config.json: text.quantization_config: differs from quantization_config",
    ),
}


def forget_quantization(path):
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))


def drop_tensor(path, ending):
    state = load_file(path)
    del state[min(name for name in state if name.endswith(ending))]
    path.unlink()
    save_file(state, path, metadata={"format": "pt"})


VALID_METADATA = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": True}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_checkpoint_is_refused_with_one_line_that_names_the_fault(checkpoint, tmp_path, breakage):
    folder = shutil.copytree(checkpoint, tmp_path / "broken")
    damage, message = BREAKAGES[breakage]
    damage(folder)
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)


def test_a_model_in_16_bit_without_one_of_its_weights_does_not_run_on_random_ones(source, tmp_path):
    folder = shutil.copytree(source / "text_encoder", tmp_path / "broken")
    drop_tensor(folder / "model.safetensors", "layer_norm1.weight")
    with pytest.raises(CheckpointFormatError, match=r"broken: .*layer_norm1.weight: missing from the weights"):
        load_model(folder)


def test_a_pipeline_given_as_a_model_is_told_to_be_loaded_as_one(source):
    with pytest.raises(CheckpointFormatError, match="is a pipeline; load it with load_pipeline"):
        load_model(source)


@pytest.mark.parametrize("load", [load_pipeline, load_model])
def test_a_dtype_that_is_a_text_is_refused(source, load):
    with pytest.raises(QuantkitRuntimeError, match=r"dtype 'bfloat16': not a torch.dtype; give one, as torch.bfl"):
        load(source, dtype="bfloat16")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "nowhere: not a folder; give a local model folder or a hub id"),
        ("/no/such/folder", "/no/such/folder: not a folder"),
    ],
)
def test_a_path_that_is_neither_folder_nor_hub_id_is_refused(path, message):
    with pytest.raises(CheckpointFormatError, match=message):
        load_pipeline(path)


def test_a_hub_id_that_cannot_be_fetched_is_refused_in_one_line(monkeypatch):
    def fail(*_, **__):
        raise OSError("first line\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointFormatError, match=r"some/model: no such folder, .* \(first line\)$"):
        load_pipeline("some/model")


def test_of_a_hub_id_diffusers_fetches_what_its_pipeline_needs(monkeypatch, source):
    """FLUX.1-dev's repository has a copy of the weights in single files, too."""
    asked = []

    def fetch(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision, allow_patterns))
        return str(source)

    def fetch_pipeline(repo_id, **options):
        asked.append((repo_id, options))
        return str(source)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", fetch_pipeline)
    assert type(load_pipeline("some/model")).__name__ == "FluxPipeline"
    assert asked == [
        ("some/model", None, ["model_index.json", "config.json"]),
        ("some/model", {"revision": None, "use_safetensors": True}),
    ]


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta"])
def test_a_device_that_is_not_here_is_refused(source, device):
    with pytest.raises(BackendUnavailableError, match=device):
        load_pipeline(source, device=device)


def test_a_backend_that_does_not_exist_is_refused(checkpoint):
    with pytest.raises(BackendUnavailableError, match="backend 'marlin' does not exist"):
        load_pipeline(checkpoint, backend="marlin")


def test_a_class_unknown_to_the_library_is_refused(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint / "transformer", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "FutureTransformer"}))
    with pytest.raises(CheckpointFormatError, match="FutureTransformer: unknown to the installed diffusers"):
        load_model(folder)


def test_a_missing_library_is_named_with_the_command_that_installs_it(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'quantkit-runtime\[diffusers\]'"):
        load_pipeline(source)
