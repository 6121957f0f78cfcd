"""Tensor parallelism: ranks that share the weights of a model, each layer cut when it is read.

A plan names the Linears of a model class that are cut by output features (``column``) and those by input features
(``row``): a pair of them needs one sum over the ranks, after the second. What a rank holds are ordinary layers of
smaller size, packed or not; the sum is a hook on the second. Of a row layer's bias the first rank has the values,
the others have zeros, so that it is added once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantkit_runtime.bitstream import WORD_BITS, codes_per_run
from quantkit_runtime.config import Scheme
from quantkit_runtime.errors import ParallelError
from quantkit_runtime.parallel.plans import COUNTS, plan_of

MOST_RANKS = 64
"""Up to here the sizes are tried that a message names."""
AWQ = "auto_round:auto_awq"


@dataclass(frozen=True)
class Share:
    """What one rank holds of a layer.

    Attributes:
        style: ``column``, ``row`` or ``norm`` (over features that are cut).
        spans: Start and stop of each piece along the axis that is cut, in features.
        features: Along that axis, of the whole layer.
        scheme: How a packed layer is stored; None of one in 16 bit.
        first: Whether the rank is the first of the group.
    """

    style: str
    spans: tuple[tuple[int, int], ...]
    features: int
    scheme: Scheme | None
    first: bool

    @property
    def width(self) -> int:
        """Features of the rank along the axis that is cut."""
        return sum(stop - start for start, stop in self.spans)

    def take(self, suffix: str, stored: Any) -> Tensor:
        """Read the rank's part of one tensor.

        Args:
            suffix: Its name in the layer: ``weight``, ``bias``, ``qweight`` ...
            stored: A slice of ``safetensors``, or a tensor.
        """
        shape = tuple(stored.shape) if isinstance(stored, Tensor) else tuple(stored.get_shape())
        whole: Tensor
        if self.style == "row" and suffix == "bias":
            whole = stored[:]
            return whole if self.first else torch.zeros_like(whole)
        if self.style == "row" and suffix in ("qzeros", "scales") and self._is_one_group:
            whole = stored[:]
            return whole
        axis, numerator, denominator = self._axis(suffix)
        pieces = [
            stored[
                tuple(
                    slice(start * numerator // denominator, stop * numerator // denominator)
                    if dimension == axis
                    else slice(None)
                    for dimension in range(len(shape))
                )
            ]
            for start, stop in self.spans
        ]
        part = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis)
        return part.contiguous()

    @property
    def _is_one_group(self) -> bool:
        return self.scheme is not None and self.scheme.group_size == -1

    def _axis(self, suffix: str) -> tuple[int, int, int]:
        """Return the axis that is cut, and the ratio of its entries to features."""
        column = self.style == "column"
        if self.scheme is None or suffix not in ("qweight", "qzeros", "scales"):
            return (1 if self.style == "row" else 0), 1, 1
        words = (self.scheme.bits, WORD_BITS)
        if column:
            packed = suffix == "qzeros" or (suffix == "qweight" and self.scheme.packing_format == AWQ)
            return (1, *(words if packed else (1, 1)))
        if suffix == "qweight":
            return (0, *((1, 1) if self.scheme.packing_format == AWQ else words))
        return 0, 1, self.scheme.group_length(self.features)


@dataclass(frozen=True)
class _Cut:
    """What is cut, before it is known for how many ranks.

    Attributes:
        name: Of the module.
        what: That is cut, for messages.
        style: See `Share`; ``count`` for an attribute of a module, which ``what`` names.
        parts: Lengths along the axis, each cut by itself.
        unit: What the length of a piece must be a multiple of.
        why: Of the unit, for messages.
        scheme: Of a packed layer.
    """

    name: str
    what: str
    style: str
    parts: tuple[int, ...]
    unit: int = 1
    why: str = ""
    scheme: Scheme | None = None

    def fits(self, ranks: int) -> bool:
        return all(part % (ranks * self.unit) == 0 for part in self.parts)


def shard(
    model: nn.Module, group: dist.ProcessGroup, scheme_of: Callable[[str], Scheme | None]
) -> dict[str, Share]:
    """Make the layers of a plan as small as a rank's share, before they get weights.

    Args:
        model: Of a class that has a plan, on the meta device.
        group: The ranks that share it.
        scheme_of: Scheme of a packed layer by the name of its module, None if it is in 16 bit.

    Returns:
        Name of each module that is cut -> this rank's share of it.

    Raises:
        ParallelError: The model's class has no plan, or a layer cannot be cut for so many ranks.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    cuts = [_cut(name, module, *entry, scheme_of(name)) for name, (module, entry) in _planned(model).items()]
    cuts += _counts(model, {cut.name for cut in cuts if cut.style == "column"})
    for cut in cuts:
        if not cut.fits(ranks):
            _refuse(model, cut, cuts, ranks)
    shares = {}
    for cut in cuts:
        module: Any = model.get_submodule(cut.name)
        if cut.style == "count":
            setattr(module, cut.what, cut.parts[0] // ranks)
            continue
        share = Share(cut.style, _spans(cut.parts, ranks, rank), sum(cut.parts), cut.scheme, rank == 0)
        shares[cut.name] = share
        _replace(model, cut.name, _smaller(module, share, group))
    return shares


def add_sums(model: nn.Module, shares: Mapping[str, Share], group: dist.ProcessGroup) -> None:
    """Add up the outputs of row layers over the ranks, from now on."""

    def add_up(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        dist.all_reduce(output, group=group)
        return output

    for name, share in shares.items():
        if share.style == "row":
            model.get_submodule(name).register_forward_hook(add_up)
    model.tensor_parallel_group = group  # type: ignore[assignment]


def group_of(module: Any) -> dist.ProcessGroup | None:
    """Return the ranks that share a model's weights, None if it is whole."""
    found: dist.ProcessGroup | None = getattr(module, "tensor_parallel_group", None)
    return found


class ShardedRMSNorm(nn.Module):
    """RMSNorm over features of which every rank holds some.

    Args:
        width: Features of this rank.
        features: Of all ranks.
        eps: Added to the mean square.
        group: The ranks.
        dtype: Of the weight.
    """

    def __init__(
        self, width: int, features: int, eps: float, group: dist.ProcessGroup, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))
        self.features = features
        self.eps = eps
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (..., width) by the mean square over all ranks, computed in float32."""
        wide = x.float()
        squares = wide.square().sum(-1, keepdim=True)
        dist.all_reduce(squares, group=self._group)
        normal = wide * torch.rsqrt(squares / self.features + self.eps) * self.weight
        return normal.to(x.dtype)


def _planned(model: nn.Module) -> dict[str, tuple[nn.Module, tuple[str, tuple[int, ...]]]]:
    """Return every module of a plan with its style and the proportions of its parts."""
    found: dict[str, tuple[nn.Module, tuple[str, tuple[int, ...]]]] = {}
    modules: dict[str, Any] = dict(model.named_modules())
    for pattern, entry in plan_of(type(model)).items():
        expression = _expression(pattern.removesuffix("?"))
        names = [name for name in modules if expression.fullmatch(name)]
        if not names and not pattern.endswith("?"):
            raise ParallelError(
                f"{type(model).__name__}: has no {pattern}, which its tensor-parallel plan names; the installed "
                "diffusers is of another version"
            )
        found |= {name: (modules[name], entry) for name in names}
    return found


def _cut(name: str, module: nn.Module, style: str, proportions: Sequence[int], scheme: Scheme | None) -> _Cut:
    if style == "norm":
        return _Cut(name, "features", style, (int(getattr(module, "weight").shape[0]),))  # noqa: B009
    assert isinstance(module, nn.Linear)
    features = module.out_features if style == "column" else module.in_features
    stored = getattr(module, f"_tp_packed_{'col' if style == 'column' else 'row'}_blocks", None)  # diffusers'
    proportions = proportions or stored or (1,)
    parts = tuple(features * share // sum(proportions) for share in proportions)
    what = "out_features" if style == "column" else "in_features"
    if scheme is None:
        return _Cut(name, what, style, parts)
    run = codes_per_run(scheme.bits)
    if style == "column":
        return _Cut(name, what, style, parts, run, f"{scheme.bits}-bit packing", scheme)
    group = 1 if scheme.group_size == -1 else scheme.group_size
    unit = math.lcm(group, 1 if scheme.packing_format == AWQ else run)
    why = f"{scheme.bits}-bit packing" if unit == run else f"group_size {scheme.group_size}"
    return _Cut(name, what, style, parts, unit, why, scheme)


def _counts(model: nn.Module, columns: set[str]) -> list[_Cut]:
    """Return the attributes that are divided by the ranks: the heads of attention, and those of `COUNTS`."""
    patterns = {_expression(pattern): what for pattern, what in COUNTS.get(type(model).__name__, {}).items()}
    cuts = []
    for name, module in model.named_modules():
        found = [what for expression, what in patterns.items() if expression.fullmatch(name)]
        found += ["heads"] if f"{name}.to_q" in columns else []
        cuts += [_Cut(name, what, "count", (int(getattr(module, what)),)) for what in found]
    return cuts


def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"\d+"))


def _refuse(model: nn.Module, cut: _Cut, cuts: Sequence[_Cut], ranks: int) -> None:
    works = [str(count) for count in range(2, MOST_RANKS + 1) if all(each.fits(count) for each in cuts)]
    size = " + ".join(str(part) for part in cut.parts)
    rule = f": a rank's part must be a multiple of {cut.unit} ({cut.why})" if cut.unit > 1 else ""
    mend = f"{', '.join(works)} ranks can share this model" if works else "no number of ranks can share this model"
    raise ParallelError(
        f"{type(model).__name__}: {cut.name}: {cut.what} {size} cannot be divided by {ranks} ranks{rule}; {mend}"
    )


def _spans(parts: Sequence[int], ranks: int, rank: int) -> tuple[tuple[int, int], ...]:
    spans = []
    offset = 0
    for part in parts:
        piece = part // ranks
        spans.append((offset + rank * piece, offset + (rank + 1) * piece))
        offset += part
    return tuple(spans)


def _smaller(module: nn.Module, share: Share, group: dist.ProcessGroup) -> nn.Module:
    with torch.device("meta"):
        if share.style == "norm":
            norm: Any = module
            return ShardedRMSNorm(share.width, share.features, norm.eps, group, dtype=norm.weight.dtype)
        assert isinstance(module, nn.Linear)
        column = share.style == "column"
        return nn.Linear(
            module.in_features if column else share.width,
            share.width if column else module.out_features,
            bias=module.bias is not None,
            dtype=module.weight.dtype,
        )


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)
