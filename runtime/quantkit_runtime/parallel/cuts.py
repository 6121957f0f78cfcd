"""Which modules of a model are cut under tensor parallelism, and by how many ranks they can be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from quantkit_runtime.bitstream import codes_per_run
from quantkit_runtime.config import Scheme
from quantkit_runtime.errors import ParallelError
from quantkit_runtime.experts import PROJECTIONS
from quantkit_runtime.parallel.plans import COUNTS, Entry, plan_of
from quantkit_runtime.parallel.share import AWQ, BY_OUTPUT

MOST_RANKS = 64
"""Up to here the sizes are tried that a message names."""
SchemeOf = Callable[[str], Scheme | None]
"""Scheme of a packed layer by the name of its module, None if it is in 16 bit."""


@dataclass(frozen=True)
class Cut:
    """What is cut, before it is known for how many ranks.

    Attributes:
        name: Of the module.
        what: That is cut, for messages; of the style ``count`` the attribute of the module that is divided.
        style: As `Share` has it, ``experts`` (a module of fused ones) or ``count``.
        parts: Lengths along the axis, each cut by itself.
        unit: What the length of a piece must be a multiple of.
        why: Of the unit, for messages.
        scheme: Of packed layers.
    """

    name: str
    what: str
    style: str
    parts: tuple[int, ...]
    unit: int = 1
    why: str = ""
    scheme: Scheme | None = None

    def fits(self, ranks: int) -> bool:
        """Whether this many ranks can have equal pieces."""
        return all(part % (ranks * self.unit) == 0 for part in self.parts)

    def spans(self, ranks: int, rank: int) -> tuple[tuple[int, int], ...]:
        """Return start and stop of each piece of a rank."""
        spans = []
        offset = 0
        for part in self.parts:
            piece = part // ranks
            spans.append((offset + rank * piece, offset + (rank + 1) * piece))
            offset += part
        return tuple(spans)


def list_cuts(model: nn.Module, ranks: int, scheme_of: SchemeOf) -> list[Cut]:
    """Return all that is cut in a model.

    Raises:
        ParallelError: The model has no plan, or a layer cannot be cut for so many ranks.
    """
    cuts = []
    for name, (module, (style, proportions)) in _planned(model).items():
        if style == "norm":
            cuts.append(Cut(name, "features", style, (module.weight.shape[0],)))
        elif style == "table":
            cuts.append(Cut(name, "heads", style, (module.embedding_dim,)))
        elif style == "experts":
            cuts.append(_cut_experts(name, module, scheme_of))
        else:
            heads = model.get_submodule(name.rpartition(".")[0])
            cuts.append(_cut_linear(name, module, style, proportions, scheme_of(name), heads))
    cuts += _counts(model, {cut.name for cut in cuts if cut.style == "column"})
    if not cuts:
        raise ParallelError(f"{type(model).__name__}: has no layer that a plan names; run it on one rank")
    for cut in cuts:
        if not cut.fits(ranks):
            _refuse(model, cut, cuts, ranks)
    return cuts


def _planned(model: nn.Module) -> dict[str, tuple[Any, Entry]]:
    """Return every module of a plan with its style and the proportions of its parts."""
    found: dict[str, tuple[Any, Entry]] = {}
    modules: dict[str, Any] = dict(model.named_modules())
    for pattern, entry in plan_of(model).items():
        expression = _expression(pattern.removesuffix("?"))
        names = [name for name in modules if expression.fullmatch(name)]
        if not names and not pattern.endswith("?"):
            raise ParallelError(
                f"{type(model).__name__}: has no {pattern}, which its tensor-parallel plan names; the installed "
                "diffusers is of another version"
            )
        found |= {name: (modules[name], entry) for name in names}
    return found


def _cut_linear(
    name: str, linear: Any, style: str, proportions: Sequence[int], scheme: Scheme | None, owner: Any
) -> Cut:
    column = style in BY_OUTPUT
    features = linear.out_features if column else linear.in_features
    stored = getattr(linear, f"_tp_packed_{'col' if column else 'row'}_blocks", None)  # diffusers'
    proportions = proportions or stored or (1,)
    parts = tuple(features * share // sum(proportions) for share in proportions)
    what = "out_features" if column else "in_features"
    unit, why = _unit("column" if column else "row", scheme)
    if column and hasattr(owner, "head_dim"):  # heads stay whole, also those of keys and values
        whole = math.lcm(unit, int(owner.head_dim))
        unit, why = whole, why if whole == unit else "a head"
    return Cut(name, what, style, parts, unit, why, scheme)


def _cut_experts(name: str, experts: Any, scheme_of: SchemeOf) -> Cut:
    """Cut the intermediate features, which gate and up give and down takes."""
    scheme = scheme_of(f"{name}.0.{PROJECTIONS[0]}")
    unit, why = _unit("row", scheme)
    if scheme is not None:
        unit = math.lcm(unit, codes_per_run(scheme.bits))
    return Cut(name, "intermediate features", "experts", (int(experts.down_proj.shape[-1]),), unit, why, scheme)


def _unit(style: str, scheme: Scheme | None) -> tuple[int, str]:
    """Return what a piece of a packed layer must be a multiple of, and why."""
    if scheme is None:
        return 1, ""
    run, packing = codes_per_run(scheme.bits), f"{scheme.bits}-bit packing"
    if style == "column":
        return run, packing
    group = 1 if scheme.group_size == -1 else scheme.group_size
    unit = math.lcm(group, 1 if scheme.packing_format == AWQ else run)
    return unit, packing if unit == run else f"group_size {scheme.group_size}"


def _counts(model: nn.Module, columns: set[str]) -> list[Cut]:
    """Return the attributes that are divided by the ranks: the heads of attention, and those of `COUNTS`."""
    patterns = {_expression(pattern): names for pattern, names in COUNTS.get(type(model).__name__, {}).items()}
    cuts = []
    for name, module in model.named_modules():
        found = [what for expression, names in patterns.items() if expression.fullmatch(name) for what in names]
        found += ["heads"] if f"{name}.to_q" in columns else []
        cuts += [Cut(name, what, "count", (int(getattr(module, what)),)) for what in found]
    return cuts


def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"\d+"))


def _refuse(model: nn.Module, cut: Cut, cuts: Sequence[Cut], ranks: int) -> None:
    works = [str(count) for count in range(2, MOST_RANKS + 1) if all(each.fits(count) for each in cuts)]
    size = " + ".join(str(part) for part in cut.parts)
    rule = f": a rank's part must be a multiple of {cut.unit} ({cut.why})" if cut.unit > 1 else ""
    mend = f"{', '.join(works)} ranks can share this model" if works else "no number of ranks can share this model"
    raise ParallelError(
        f"{type(model).__name__}: {cut.name}: {cut.what} {size} cannot be divided by {ranks} ranks{rule}; {mend}"
    )
