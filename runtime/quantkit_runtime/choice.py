"""What callers choose: for packed layers by name how they compute and the backend of their kernels; CUDA graphs.

Looking at a model reads its configurations alone; torch is imported only once a name has to be known.
"""

from __future__ import annotations

from pathlib import Path

from quantkit_runtime.checkpoint import read_json
from quantkit_runtime.config import quantization_of
from quantkit_runtime.errors import BackendUnavailableError


def is_packed(folder: Path) -> bool:
    """Whether a model, or a component of a pipeline, has packed layers.

    Raises:
        CheckpointFormatError: A configuration is damaged, or not one that this runtime reads.
    """
    parts = [folder]
    if (index := folder / "model_index.json").is_file():
        parts = [folder / name for name, entry in read_json(index).items() if isinstance(entry, list)]
    configs = [path for part in parts if (path := part / "config.json").is_file()]
    return any(quantization_of(read_json(path), path) is not None for path in configs)


def check_choice(*folders: Path, compute: str, backend: str) -> None:
    """Refuse a name that does not exist, or that changes nothing because no layer is packed.

    Args:
        folders: Models that are loaded with these names; those that are not packed do without.
        compute: ``"auto"``, ``"16bit"`` (which layers that are not packed compute in as well) or ``"fp8"``.
        backend: ``"auto"`` or the name of one.

    Raises:
        BackendUnavailableError: The message names what was chosen.
        CheckpointFormatError: See `is_packed`.
    """
    if compute == "auto" and backend == "auto":
        return
    from quantkit_runtime.kernels import check_backend, resolve_compute

    named = []
    if resolve_compute(compute) != "16bit":
        named.append(f"compute {compute!r}")
    if backend != "auto":
        check_backend("linear", backend)  # which has all names
        named.append(f"backend {backend!r}")
    if named and not any(is_packed(folder) for folder in folders):
        models = " and ".join(str(folder) for folder in folders)
        raise BackendUnavailableError(
            f"{' and '.join(named)}: only for packed layers, and {models} "
            f"{'is' if len(folders) == 1 else 'are'} not quantized; leave it out"
        )


def check_cuda_graphs(device: str, *, shares_weights: bool) -> None:
    """Refuse, before anything is loaded, to record steps where that cannot be done.

    Args:
        device: Where the model will run.
        shares_weights: Whether several ranks share its weights; what they tell each other is not recorded.

    Raises:
        BackendUnavailableError: It is no CUDA device, or ranks share the weights.
    """
    if not device.startswith("cuda"):
        raise BackendUnavailableError(f"CUDA graphs need a CUDA device, not {device}; leave them out")
    if shares_weights:
        raise BackendUnavailableError(
            "CUDA graphs do not record what ranks that share weights tell each other; leave them out, or tensor "
            "parallelism"
        )
