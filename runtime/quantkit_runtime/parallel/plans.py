"""Tensor-parallel plans: which Linears of a model class are cut, and along which features.

transformers has plans of its own for its models, diffusers for some (``_tp_plan``); they are taken as they are. A
key is a module's name with ``*`` for the number of a block; it ends in ``?`` where not every model of the class has
the module. A value is the style (`quantkit_runtime.parallel.share.Share`) and, where features are several tensors
side by side, their proportions: each is cut by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quantkit_runtime.errors import ParallelError
from quantkit_runtime.names import is_transformers

Entry = tuple[str, tuple[int, ...]]

_COLUMN: Entry = ("column", ())
_ROW: Entry = ("row", ())
_NORM: Entry = ("norm", ())
_GATHERED: Entry = ("gathered", ())


def _each(prefix: str, names: Iterable[str], entry: Entry) -> dict[str, Entry]:
    return {f"{prefix}.{name}": entry for name in names}


_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_FLUX_MODULATIONS = {
    **_each("transformer_blocks.*", ("norm1.linear", "norm1_context.linear"), _GATHERED),
    "single_transformer_blocks.*.norm.linear": _GATHERED,
}

_OVIS_IMAGE = {
    **_FLUX_MODULATIONS,
    **_each("transformer_blocks.*.attn", (*_QKV, *_ADDED), _COLUMN),
    **_each("transformer_blocks.*.attn", ("to_out.0", "to_add_out"), _ROW),
    **_each("transformer_blocks.*", ("ff.net.0.proj", "ff_context.net.0.proj"), ("column", (1, 1))),  # value, gate
    **_each("transformer_blocks.*", ("ff.net.2", "ff_context.net.2"), _ROW),
    **_each("single_transformer_blocks.*.attn", _QKV, _COLUMN),
    "single_transformer_blocks.*.proj_mlp": ("column", (1, 1)),
    "single_transformer_blocks.*.proj_out": ("row", (1, 4)),  # attention, feed-forward
}
_GLM_IMAGE = {
    "transformer_blocks.*.norm1.linear": _GATHERED,
    **_each("transformer_blocks.*.attn1", _QKV, _COLUMN),
    "transformer_blocks.*.attn1.to_out.0": _ROW,
    "transformer_blocks.*.ff.net.0.proj": _COLUMN,
    "transformer_blocks.*.ff.net.2": _ROW,
}
_WAN = {
    **{
        key: entry
        for attention in ("blocks.*.attn1", "blocks.*.attn2")
        for key, entry in {
            **_each(attention, _QKV, _COLUMN),
            **_each(attention, ("norm_q", "norm_k"), _NORM),  # over all heads
            f"{attention}.to_out.0": _ROW,
        }.items()
    },
    **_each("blocks.*.attn2", ("add_k_proj?", "add_v_proj?"), _COLUMN),
    "blocks.*.attn2.norm_added_k?": _NORM,
    "blocks.*.ffn.net.0.proj": _COLUMN,
    "blocks.*.ffn.net.2": _ROW,
}
_BAGEL = {
    f"language_model.model.layers.*.{name}{expert}{part}": entry
    for expert in ("", "_moe_gen")
    for name, part, entry in (
        *((f"self_attn.{projection}_proj", "", _COLUMN) for projection in "qkv"),
        ("self_attn.o_proj", "", _ROW),
        ("mlp", ".gate_proj", _COLUMN),
        ("mlp", ".up_proj", _COLUMN),
        ("mlp", ".down_proj", _ROW),
    )
}
_T5_ATTENTION = "encoder.block.*.layer.0.SelfAttention"
_T5 = {
    **_each(_T5_ATTENTION, "qkv", _COLUMN),
    f"{_T5_ATTENTION}.o": _ROW,
    f"{_T5_ATTENTION}.relative_attention_bias?": ("table", ()),
    **_each("encoder.block.*.layer.1.DenseReluDense", ("wi?", "wi_0?", "wi_1?"), _COLUMN),
    "encoder.block.*.layer.1.DenseReluDense.wo": _ROW,
}
_OWN: Mapping[str, Mapping[str, Entry]] = {
    "Bagel": _BAGEL,
    "GlmImageTransformer2DModel": _GLM_IMAGE,
    "OvisImageTransformer2DModel": _OVIS_IMAGE,
    "T5EncoderModel": _T5,
    "UMT5EncoderModel": _T5,
    "WanTransformer3DModel": _WAN,
}
ENCODERS = ("Qwen3Model", "T5EncoderModel", "UMT5EncoderModel")
"""Text encoders of pipelines that are shared, too, where their sizes allow it."""
_MORE: Mapping[str, Mapping[str, Entry]] = {"FluxTransformer2DModel": _FLUX_MODULATIONS}
"""What is cut beside the layers of diffusers' plan."""
COUNTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "OvisImageTransformer2DModel": {"single_transformer_blocks.*": ("mlp_hidden_dim",)},
    "T5EncoderModel": {_T5_ATTENTION: ("n_heads", "inner_dim")},
    "UMT5EncoderModel": {_T5_ATTENTION: ("n_heads", "inner_dim")},
}
"""Attributes that are divided by the ranks, beside the ``heads`` of attention: modules split outputs by them."""

_DIFFUSERS = {
    "colwise": "column",
    "rowwise": "row",
    "PackedColwiseParallel": "column",
    "PackedRowwiseParallel": "row",
}
_TRANSFORMERS = {"colwise": "column", "rowwise": "row", "moe_tp_experts": "experts"}
_WHOLE = ("talker.",)
"""Parts of transformers' models that are not cut: they are small and speak one token after the other."""


def has_plan(model_class: Any) -> bool:
    """Whether diffusers' models of this class can be shared by several ranks."""
    return bool(getattr(model_class, "_tp_plan", None)) or model_class.__name__ in _OWN


def plan_of(model: Any) -> Mapping[str, Entry]:
    """Return the plan of a model.

    Raises:
        ParallelError: It has none.
    """
    name, theirs = type(model).__name__, getattr(model, "_tp_plan", None)
    if theirs and is_transformers(model):
        return _plan_of_transformers(theirs)
    if theirs:
        translated = {key: _translate(style, f"{name}._tp_plan: {key}") for key, style in theirs.items()}
        return {**translated, **_MORE.get(name, {})}
    if name not in _OWN:
        raise ParallelError(f"{name}: has no tensor-parallel plan; run it on one rank")
    return _OWN[name]


def _plan_of_transformers(theirs: Mapping[str, str]) -> Mapping[str, Entry]:
    """Take the Linears and fused experts of a plan; embeddings, head and norms stay whole on every rank.

    Such a plan serves all models of a configuration's class, so not every one has all of it.
    """
    experts = tuple(f"{key}." for key, style in theirs.items() if _TRANSFORMERS.get(style) == "experts")
    return {
        f"{key}?": (_TRANSFORMERS[style], ())
        for key, style in theirs.items()
        if style in _TRANSFORMERS and not key.startswith((*_WHOLE, *experts))
    }


def _translate(style: Any, where: str) -> Entry:
    """Turn a style of diffusers into one of ours."""
    name = style if isinstance(style, str) else type(style).__name__
    if name not in _DIFFUSERS:
        raise ParallelError(f"{where}: {name!r} is a style that is not known here; use another diffusers")
    return _DIFFUSERS[name], tuple(getattr(style, "blocks", None) or ())
