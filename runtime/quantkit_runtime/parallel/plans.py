"""Tensor-parallel plans: which Linears of a model class are cut, and along which features.

diffusers has plans of its own for some classes (``_tp_plan``); they are taken as they are. A key is a module's name
with ``*`` for the number of a block; it ends in ``?`` where not every model of the class has the module. A value is
the style (`quantkit_runtime.parallel.tensor.Share`) and, where features are several tensors side by side, their
proportions: each is cut by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quantkit_runtime.errors import ParallelError

Entry = tuple[str, tuple[int, ...]]

_COLUMN: Entry = ("column", ())
_ROW: Entry = ("row", ())
_NORM: Entry = ("norm", ())


def _each(prefix: str, names: Iterable[str], entry: Entry) -> dict[str, Entry]:
    return {f"{prefix}.{name}": entry for name in names}


_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")

_OVIS_IMAGE = {
    **_each("transformer_blocks.*.attn", (*_QKV, *_ADDED), _COLUMN),
    **_each("transformer_blocks.*.attn", ("to_out.0", "to_add_out"), _ROW),
    **_each("transformer_blocks.*", ("ff.net.0.proj", "ff_context.net.0.proj"), ("column", (1, 1))),  # value, gate
    **_each("transformer_blocks.*", ("ff.net.2", "ff_context.net.2"), _ROW),
    **_each("single_transformer_blocks.*.attn", _QKV, _COLUMN),
    "single_transformer_blocks.*.proj_mlp": ("column", (1, 1)),
    "single_transformer_blocks.*.proj_out": ("row", (1, 4)),  # attention, feed-forward
}
_GLM_IMAGE = {
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
_OWN: Mapping[str, Mapping[str, Entry]] = {
    "GlmImageTransformer2DModel": _GLM_IMAGE,
    "OvisImageTransformer2DModel": _OVIS_IMAGE,
    "WanTransformer3DModel": _WAN,
}
COUNTS: Mapping[str, Mapping[str, str]] = {
    "OvisImageTransformer2DModel": {"single_transformer_blocks.*": "mlp_hidden_dim"},
}
"""Attributes that are divided by the ranks, beside the ``heads`` of attention: modules split outputs by them."""

_DIFFUSERS_STYLES = {
    "colwise": "column",
    "rowwise": "row",
    "PackedColwiseParallel": "column",
    "PackedRowwiseParallel": "row",
}


def has_plan(model_class: Any) -> bool:
    """Whether models of this class can be shared by several ranks."""
    return bool(getattr(model_class, "_tp_plan", None)) or model_class.__name__ in _OWN


def plan_of(model_class: Any) -> Mapping[str, Entry]:
    """Return the plan of a model class.

    Raises:
        ParallelError: It has none.
    """
    theirs = getattr(model_class, "_tp_plan", None)
    if theirs:
        return {key: _translate(style, f"{model_class.__name__}._tp_plan: {key}") for key, style in theirs.items()}
    if model_class.__name__ not in _OWN:
        raise ParallelError(f"{model_class.__name__}: has no tensor-parallel plan; run it on one rank")
    return _OWN[model_class.__name__]


def _translate(style: Any, where: str) -> Entry:
    """Turn a style of diffusers into one of ours."""
    name = style if isinstance(style, str) else type(style).__name__
    if name not in _DIFFUSERS_STYLES:
        raise ParallelError(f"{where}: {name!r} is a style that is not known here; use another diffusers")
    return _DIFFUSERS_STYLES[name], tuple(getattr(style, "blocks", None) or ())
