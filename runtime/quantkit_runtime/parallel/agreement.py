"""Making sure that all ranks do the same: equal arguments, one seed, equal latents.

Ranks are given as groups, one along each dimension of their mesh: what goes along all of them reaches every rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quantkit_runtime.errors import ParallelError

Groups = Sequence[dist.ProcessGroup | None]


def check_same_arguments(arguments: Mapping[str, Any], groups: Groups) -> None:
    """Compare the arguments of a call across ranks.

    Tensors, images and generators are compared by content, functions by name.

    Args:
        arguments: Keyword arguments of the call on this rank.
        groups: The ranks that must agree; None is the group of all.

    Raises:
        ParallelError: Some differ; raised on every rank, and names the arguments.
    """
    mine = {name: _fingerprint(value) for name, value in arguments.items()}
    everyone = [mine]
    for group in groups:
        gathered: list[list[dict[str, str]]] = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(gathered, everyone, group=group)
        everyone = list(chain.from_iterable(gathered))
    names = sorted({name for theirs in everyone for name in theirs})
    differing = [name for name in names if len({theirs.get(name) for theirs in everyone}) > 1]
    if differing:
        raise ParallelError(
            f"{', '.join(differing)}: not the same on all ranks; every rank must make the same call"
        )


def _fingerprint(value: Any) -> str:
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    digest.update(type(value).__name__.encode())
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, torch.Generator):
        digest.update(value.get_state().numpy().tobytes())
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            digest.update(repr(key).encode())
            _update(digest, entry)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for entry in value:
            _update(digest, entry)
    elif callable(value):
        digest.update(getattr(value, "__qualname__", "").encode())
    elif hasattr(value, "tobytes"):  # PIL images and numpy arrays
        digest.update(f"{getattr(value, 'size', None)}{getattr(value, 'mode', None)}".encode())
        digest.update(value.tobytes())
    else:
        digest.update(repr(value).encode())


def shared_seed(groups: Groups, seed: int | None = None) -> int:
    """Return the seed of the first rank, by default one that it draws."""
    drawn: list[int] = [int(torch.seed()) % 2**63 if seed is None else seed]
    for group in groups:
        dist.broadcast_object_list(drawn, group=group, group_src=0)
    return drawn[0]


def checksum(tensor: Tensor) -> Tensor:
    """Return an int64 scalar, on the tensor's device, that depends on every bit of a tensor of 16 bits or more.

    Not cryptographic: it is cheap, exact, and independent of the order in which a device adds.
    """
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(width).flatten().to(torch.int64)
    places = torch.arange(bits.numel(), device=bits.device) % 8191 + 1
    return (bits * places).sum()


def check_same_inputs(inputs: Iterable[Any], groups: Groups) -> None:
    """Compare what a model is called with across ranks by checksums; waits for the device.

    Args:
        inputs: Arguments of the call; what is no tensor of 16 bits or more is passed over.
        groups: The ranks that must agree.

    Raises:
        ParallelError: On every rank, if they differ.
    """
    tensors = [value for value in inputs if isinstance(value, Tensor) and value.element_size() > 1]
    if not tensors:
        return
    sums = torch.stack([checksum(tensor) for tensor in tensors])
    both = torch.cat([sums, -sums])
    for group in groups:
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    largest, negated_smallest = both.chunk(2)
    if not torch.equal(largest, -negated_smallest):
        raise ParallelError(
            "the ranks call the model with different inputs; call the pipeline through "
            "quantkit_runtime.parallel.parallel_call, or give every rank the same arguments and seed"
        )


def check_same_latents(latents: Tensor, suspicion: Tensor, step: int, groups: Groups) -> None:
    """Compare latents across ranks by their checksum, and ask for suspicions; waits for the device.

    Args:
        latents: Of this rank.
        suspicion: int64 scalar; not 0 where a guess of this rank turned out wrong.
        step: For the message.
        groups: The ranks that must agree.

    Raises:
        ParallelError: On every rank, if the ranks have drifted apart or a rank has a suspicion.
    """
    found = checksum(latents)
    # One reduction: the largest and, negated, the smallest checksum.
    both = torch.stack([found, -found, suspicion])
    for group in groups:
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    largest, negated_smallest, suspected = both.tolist()
    if suspected:
        raise ParallelError(
            f"step {step}: an input of the second guidance branch changed in a way that cannot be foreseen; "
            "run this pipeline without CFG-parallel"
        )
    if largest != -negated_smallest:
        raise ParallelError(
            f"step {step}: the ranks have drifted apart: their latents differ; all ranks need the same "
            "device type, library versions, and callbacks that do the same"
        )


def agree_on(value: int, checksum: int, group: dist.ProcessGroup | None) -> int:
    """Return the first rank's value, once all ranks have the same checksum; one exchange on the CPU.

    Args:
        value: Of this rank.
        checksum: Of what this rank has done so far, of at most 63 bits.
        group: The ranks that must agree; None is the group of all. Its backend serves the CPU.

    Raises:
        ParallelError: On every rank, if the checksums differ.
    """
    mine = torch.tensor([value, checksum])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    values, checksums = zip(*(theirs.tolist() for theirs in everyone), strict=True)
    apart = [str(rank) for rank, theirs in enumerate(checksums) if theirs != checksums[0]]
    if apart:
        raise ParallelError(
            f"the ranks have drifted apart: what rank {', '.join(apart)} made differs from what rank 0 made; all "
            "ranks need the same device type and library versions"
        )
    return int(values[0])
