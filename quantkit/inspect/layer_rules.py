"""Rules about packed layers: names, shapes, kernels. Each docstring states the condition.

K is a layer's in_features, N its out_features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from quantkit.inspect.metadata_rules import MOVED_BLOCKS
from quantkit.inspect.quantized import PACKED_SUFFIXES, Checkpoint, QuantizedModel
from quantkit.inspect.rule import Breach, each_model

if TYPE_CHECKING:
    from quantkit_runtime.checkpoint import TensorInfo
    from quantkit_runtime.config import Scheme

_AGAIN = "quantize the model again"
_CUDA_GROUP_SIZES = (-1, 32, 64, 128)
_XPU_BITS = (2, 4)
_XPU_K_STEP = 32
_TENSOR_PARALLEL_SIZES = (2, 4, 8)


@each_model
def packed(model: QuantizedModel) -> Iterator[Breach]:
    """What claims to be quantized holds packed layers."""
    if not model.packed:
        yield Breach(str(model.config_path), "claims to be quantized, but no layer is packed", _AGAIN)


@each_model
def block_matches(model: QuantizedModel) -> Iterator[Breach]:
    """Every listed block holds layers, but for the name of a module in another version of its library."""
    moved = {newer for older, newer in MOVED_BLOCKS.items() if older in model.blocks}
    for block in model.blocks:
        if block in moved:
            continue
        if model.packed and not any(name.startswith(block) for name in (*model.packed, *model.unpacked)):
            what = f"names {block}, which holds no layer here"
            yield Breach(f"{model.key}.block_name_to_quantize", what, "remove it, unless another version needs it")


@each_model
def block_prefixes(model: QuantizedModel) -> Iterator[Breach]:
    """Block names are plain prefixes: none reaches a 16-bit Linear of another module that begins alike."""
    for layer in model.unpacked:
        if model.blocks and model.scheme_of(layer) is not None and not model.in_blocks(layer):
            prefix = next((block for block in model.blocks if layer.startswith(block)), None)
            if prefix is not None:
                what = f"is in 16 bit, but the block name {prefix} is a prefix of its name"
                yield Breach(layer, what, f"exclude it: extra_config['{layer}'] = {{'bits': 16}}")


@each_model
def packed_is_listed(model: QuantizedModel) -> Iterator[Breach]:
    """Every packed layer is within a listed block and not excluded: the loader leaves others without weights."""
    if model.quantization is None:
        return
    for layer in model.packed:
        if model.scheme_of(layer) is None:
            mend = "list its block in block_name_to_quantize, or keep the layer in 16 bit"
            yield Breach(layer, "is packed, but the metadata says it is in 16 bit", mend)


@each_model
def listed_is_packed(model: QuantizedModel) -> Iterator[Breach]:
    """Every Linear of a listed block is packed, or excluded by a key of ``extra_config``."""
    if model.quantization is None:
        return
    for layer in model.unpacked:
        listed = model.in_blocks(layer) or layer in model.quantization.exact
        if listed and model.scheme_of(layer) is not None:
            mend = f"exclude it: extra_config['{layer}'] = {{'bits': 16}}"
            yield Breach(layer, "is in 16 bit, but the metadata says it is packed", mend)


@each_model
def runtime_keys(model: QuantizedModel) -> Iterator[Breach]:
    """A layer that differs from the default scheme is named in ``extra_config`` as the engine calls it."""
    for name, members in _fused(model).items():
        if len({model.scheme_of(member) for member in members}) > 1:
            continue  # no key can mend that
        if model.engine.member_keys and len(members) > 1:
            continue
        layer = members[0]
        scheme = model.scheme_of(layer)
        if name != layer and model.scheme_of(name) != scheme:
            bits = 16 if scheme is None else scheme.bits
            what = f"is set apart under its name here only; the engine calls it {name}"
            yield Breach(layer, what, f"repeat it: extra_config['{name}'] = {{'bits': {bits}, ...}}")


@each_model
def fused_schemes(model: QuantizedModel) -> Iterator[Breach]:
    """Linears that the engine fuses into one layer have one scheme."""
    for name, members in _fused(model).items():
        schemes = {member: model.scheme_of(member) for member in members}
        if len(set(schemes.values())) > 1:
            told = ", ".join(f"{member.rpartition('.')[2]} {_spell(scheme)}" for member, scheme in schemes.items())
            yield Breach(name, f"is fused from layers of different schemes ({told})", "give all of them the same")


@each_model
def complete(model: QuantizedModel) -> Iterator[Breach]:
    """A packed layer has ``qweight``, ``qzeros`` and ``scales``."""
    for layer, tensors in model.packed.items():
        if missing := [suffix for suffix in PACKED_SUFFIXES if suffix not in tensors]:
            yield Breach(layer, f"lacks {' and '.join(missing)}", _AGAIN)


@each_model
def aligned(model: QuantizedModel) -> Iterator[Breach]:
    """The group size divides K; K and N are multiples of what 32-bit words can hold, 8 at 4 bits."""
    from quantkit_runtime.errors import CheckpointFormatError
    from quantkit_runtime.format import packed_tensors

    for layer, scheme in model.stored.items():
        shape = model.features(layer)
        if shape is None:
            continue
        try:
            packed_tensors(*shape, scheme)
        except CheckpointFormatError as error:
            what, _, mend = str(error).partition("; ")
            yield Breach(layer, what, mend)


@each_model
def tensor_layout(model: QuantizedModel) -> Iterator[Breach]:
    """Shapes and dtypes of packed tensors are those of the layer's scheme."""
    from quantkit_runtime.errors import CheckpointFormatError
    from quantkit_runtime.format import packed_tensors

    names = {"int32": "I32", "float16": "F16"}
    for layer, scheme in model.stored.items():
        tensors = model.packed[layer]
        for info in tensors.values():
            if len(info.shape) != 2:
                yield Breach(info.name, f"has {len(info.shape)} dimensions, not 2", _AGAIN)
        shape = model.features(layer)
        if shape is None:
            continue
        try:
            expected = packed_tensors(*shape, scheme)
        except CheckpointFormatError:
            continue  # the rule about alignment tells
        for suffix, (size, dtype) in expected.items():
            info, spelled = tensors[suffix], names[str(dtype).removeprefix("torch.")]
            if info.shape != size or info.dtype != spelled:
                what = f"is {info.dtype} {list(info.shape)}, its scheme asks for {spelled} {list(size)}"
                yield Breach(info.name, what, _AGAIN)


@each_model
def trivial_g_idx(model: QuantizedModel) -> Iterator[Breach]:
    """Groups are runs of neighbouring input features: a ``g_idx`` says i // group_size."""
    for layer, scheme in model.stored.items():
        info, shape = model.tensors.get(f"{layer}.g_idx"), model.features(layer)
        if (
            info is not None
            and shape is not None
            and not _is_trivial(info, shape[0], scheme.group_length(shape[0]))
        ):
            what = "orders the groups otherwise; engines ignore it and compute something else"
            yield Breach(info.name, what, f"{_AGAIN} without activation order")


@each_model
def one_weight(model: QuantizedModel) -> Iterator[Breach]:
    """No 16-bit weight stands beside a packed one."""
    for layer in model.packed:
        if f"{layer}.weight" in model.tensors:
            yield Breach(f"{layer}.weight", "is a 16-bit weight beside the packed one", "remove it, it is stale")


@each_model
def cuda_scheme(model: QuantizedModel) -> Iterator[Breach]:
    """CUDA kernels take 4 or 8 bits symmetric in gptq packing, 4 bits asymmetric in awq packing."""
    for layer, scheme in model.stored.items():
        awq = scheme.packing_format == "auto_round:auto_awq"
        fits = (scheme.bits == 4 and not scheme.sym) if awq else (scheme.bits in (4, 8) and scheme.sym)
        if not fits:
            kind = f"{_spell(scheme)} in {'awq' if awq else 'gptq'} packing"
            yield Breach(layer, f"is {kind}, for which there is no CUDA kernel", f"{_AGAIN}, 4 bits symmetric")


@each_model
def group_size(model: QuantizedModel) -> Iterator[Breach]:
    """Groups have 32, 64 or 128 input features, or are whole rows (-1)."""
    for layer, scheme in model.stored.items():
        if scheme.group_size not in _CUDA_GROUP_SIZES:
            yield Breach(layer, f"has group size {scheme.group_size}", f"{_AGAIN} with 32, 64, 128 or -1")


@each_model
def xpu(model: QuantizedModel) -> Iterator[Breach]:
    """XPU kernels take 2 or 4 bits, symmetric, K a multiple of 32 (which other group sizes see to)."""
    for layer, scheme in model.stored.items():
        shape = model.features(layer)
        mend = f"serve it on CUDA, or {_AGAIN}"
        if scheme.bits not in _XPU_BITS or not scheme.sym:
            what = f"is {_spell(scheme)}, for which there is no XPU kernel"
            yield Breach(layer, what, f"{mend} to 4 bits symmetric")
        elif shape is not None and scheme.group_size == -1 and shape[0] % _XPU_K_STEP:
            yield Breach(layer, f"has K = {shape[0]}, no multiple of {_XPU_K_STEP} as XPU needs", mend)


@each_model
def tensor_parallel(model: QuantizedModel) -> Iterator[Breach]:
    """Split over 2, 4 or 8 devices, a row-parallel layer keeps whole groups and whole words on each."""
    for layer, scheme in model.stored.items():
        shape = model.features(layer)
        if shape is None or not model.engine.splits_input(layer):
            continue
        features = shape[0]
        step = 8 if scheme.group_size == -1 else scheme.group_size
        if features % step:
            continue
        failing = [str(size) for size in _TENSOR_PARALLEL_SIZES if features % (size * step)]
        if failing:
            what = f"K / TP is no multiple of {step} at TP = {', '.join(failing)} (K = {features})"
            yield Breach(layer, what, f"use another TP size, or {_AGAIN} with a smaller group size")


@each_model
def weight_names(model: QuantizedModel) -> Iterator[Breach]:
    """Weights are called as the model's library looks for them."""
    stem = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}.get(model.library, "")
    for file in sorted({info.file for info in model.tensors.values()}):
        if not file.name.startswith(stem):
            mend = f"rename it, also in the index, to {stem}*.safetensors"
            yield Breach(str(file), f"has a name that {model.library} does not look for", mend)


@each_model
def float32_modules(model: QuantizedModel) -> Iterator[Breach]:
    """No module relies on float32: the AutoRound loader casts those that the class keeps in it."""
    for name, info in model.tensors.items():
        if info.dtype == "F32":
            what = "is float32; the loader casts it to the dtype of the rest"
            yield Breach(name, what, "load with quantkit-runtime")


def fused_experts(checkpoint: Checkpoint) -> Iterator[Breach]:
    """No 16-bit experts wait to be fused: beside packed layers transformers drops the conversion that does it."""
    for name in checkpoint.tensors:
        if ".experts." in name and name.endswith(".weight"):
            what = "is of a 16-bit expert; transformers leaves it uninitialised beside packed layers"
            yield Breach(name, what, "load with quantkit-runtime or vLLM-Omni")


def _fused(model: QuantizedModel) -> dict[str, list[str]]:
    """Linears of the listed blocks by the name that the engine gives them; several share one if they are fused."""
    layers: dict[str, list[str]] = {}
    for layer in (*model.packed, *model.unpacked):
        if model.in_blocks(layer):
            layers.setdefault(model.engine.name_of(layer), []).append(layer)
    return layers


def _spell(scheme: Scheme | None) -> str:
    if scheme is None:
        return "16 bit"
    return f"W{scheme.bits} g{scheme.group_size} {'sym' if scheme.sym else 'asym'}"


def _is_trivial(info: TensorInfo, in_features: int, group_length: int) -> bool:
    import numpy as np
    from safetensors import safe_open

    with safe_open(info.file, framework="numpy") as file:
        found = file.get_tensor(info.name)
    return bool(np.array_equal(found, np.arange(in_features) // max(group_length, 1)))
