"""Tensor parallelism: ranks that share the weights of a model, each layer cut when it is read.

A plan names the Linears of a model class that are cut by output features (``column``) and those by input features
(``row``): a pair of them needs one sum over the ranks, after the second. What a rank holds are ordinary layers of
smaller size, packed or not; the sum is a hook on the second. Of a row layer's bias the first rank has the values,
the others have zeros, so that it is added once. Layers of one row that are in no pair (modulations) are cut by
output features, too, and their outputs put together again (``gathered``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantkit_runtime.experts import PROJECTIONS
from quantkit_runtime.parallel.agreement import check_same_inputs
from quantkit_runtime.parallel.cuts import Cut, SchemeOf, list_cuts
from quantkit_runtime.parallel.share import BY_OUTPUT, Share

WATCHED = "inputs_are_watched"
"""Attribute of a model whose ranks are kept in step by its caller."""


def shard(model: nn.Module, group: dist.ProcessGroup, scheme_of: SchemeOf) -> dict[str, Share]:
    """Make the layers of a plan as small as a rank's share, before they get weights.

    Args:
        model: Of a class that has a plan, on the meta device.
        group: The ranks that share it.
        scheme_of: Scheme of a packed layer by the name of its module, None if it is in 16 bit.

    Returns:
        Name of each module that is cut -> this rank's share of it; of fused experts, that of each projection.

    Raises:
        ParallelError: The model has no plan, or a layer cannot be cut for so many ranks.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    shares = {}
    for cut in list_cuts(model, ranks, scheme_of):
        module: Any = model.get_submodule(cut.name)
        if cut.style == "count":
            setattr(module, cut.what, cut.parts[0] // ranks)
        elif cut.style == "experts":
            for projection in PROJECTIONS:
                style = "row" if projection == PROJECTIONS[-1] else "column"
                shares[f"{cut.name}.{projection}"] = _share(cut, style, ranks, rank)
            _make_experts_smaller(module, ranks)
        else:
            share = _share(cut, cut.style, ranks, rank)
            shares[cut.name] = share
            _replace(model, cut.name, _smaller(module, share, group))
    return shares


def add_sums(model: nn.Module, shares: Mapping[str, Share], group: dist.ProcessGroup) -> None:
    """Add up the outputs of row layers over the ranks, from now on; of fused experts, that of all together.

    Those of gathered layers are put together.
    """

    def add_up(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        dist.all_reduce(output, group=group)
        return output

    def put_together(share: Share, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        # A sum with zeros is exact, one operation of all backends, and no slower for a row.
        whole = output.new_zeros(*output.shape[:-1], share.features)
        [(start, stop)] = share.spans
        whole[..., start:stop] = output
        dist.all_reduce(whole, group=group)
        return whole

    modules = dict(model.named_modules())
    for name, share in shares.items():
        if share.style == "gathered":
            modules[name].register_forward_hook(partial(put_together, share))
        elif share.style == "row":
            summed = modules[name] if name in modules else modules[name.rpartition(".")[0]]
            summed.register_forward_hook(add_up)
    model.tensor_parallel_group = group  # type: ignore[assignment]  # torch types every attribute as Tensor or Module
    model.register_forward_pre_hook(_check_inputs, with_kwargs=True)


def _check_inputs(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Refuse what gives nonsense: ranks that share weights and draw different things."""
    if not (getattr(model, WATCHED, False) or torch.compiler.is_compiling()):
        check_same_inputs((*inputs, *named.values()), (group_of(model),))


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


def _share(cut: Cut, style: str, ranks: int, rank: int) -> Share:
    return Share(style, cut.spans(ranks, rank), sum(cut.parts), cut.scheme, rank == 0)


def _smaller(module: Any, share: Share, group: dist.ProcessGroup) -> nn.Module:
    dtype = module.weight.dtype
    with torch.device("meta"):
        if share.style == "norm":
            return ShardedRMSNorm(share.width, share.features, module.eps, group, dtype=dtype)
        if share.style == "table":
            return nn.Embedding(module.num_embeddings, share.width, dtype=dtype)
        column = share.style in BY_OUTPUT
        return nn.Linear(
            module.in_features if column else share.width,
            share.width if column else module.out_features,
            bias=module.bias is not None,
            dtype=dtype,
        )


def _make_experts_smaller(experts: Any, ranks: int) -> None:
    for name, axis in (("gate_up_proj", 1), ("down_proj", 2)):
        whole = getattr(experts, name)
        shape = [size // ranks if dimension == axis else size for dimension, size in enumerate(whole.shape)]
        setattr(experts, name, nn.Parameter(torch.empty(shape, dtype=whole.dtype, device="meta")))


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)
