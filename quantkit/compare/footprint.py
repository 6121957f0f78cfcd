"""How much a model takes: bytes on disk, bytes of weights, peak memory of loading and sampling."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import ModelFolder

if TYPE_CHECKING:
    import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size to the current one


class PeakMemory:
    """Frees what nobody refers to, then measures the highest memory use above the level of that moment.

    On an accelerator this is the memory allocated by torch. On the CPU it is the resident set of the whole
    process as Linux counts it, working buffers of libraries and mapped files included.

    Args:
        device: Where the model runs.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._why_not: str | None = None
        self._base = 0
        self._peak = 0
        free_memory(device)
        try:
            if device.type == "cpu":
                self._restart(_status_bytes("VmRSS"))
            else:
                torch.accelerator.reset_peak_memory_stats(device)
                self._base = torch.accelerator.memory_allocated(device)
        except (OSError, RuntimeError, NotImplementedError) as error:
            self._why_not = f"unavailable: {error}"

    def _restart(self, base: int) -> None:
        self._base = base
        _CLEAR_REFS.write_text(_RESET_PEAK)

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave out what the block uses and keeps in host memory."""
        if self._why_not is not None or self._device.type != "cpu":
            yield
            return
        self._peak = max(self._peak, _status_bytes("VmHWM") - self._base)
        # Freed memory that the allocator has not given back would else count, on either side.
        _trim_heap()
        before = _status_bytes("VmRSS")
        yield
        _trim_heap()
        self._restart(self._base + max(_status_bytes("VmRSS") - before, 0))

    def read(self) -> tuple[int | None, str]:
        """Return the peak in bytes, None if it cannot be known, and how it was measured or why not."""
        import torch

        if self._why_not is not None:
            return None, self._why_not
        if self._device.type == "cpu":
            peak = max(self._peak, _status_bytes("VmHWM") - self._base)
            return peak, (
                "resident memory of the process above the level before loading; the model that runs first also "
                "pays for what libraries allocate once"
            )
        peak = torch.accelerator.max_memory_allocated(self._device) - self._base
        return peak, "memory allocated by torch on the device above the level before loading"


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise OSError(f"{_STATUS} has no {key}")


def free_memory(device: torch.device) -> None:
    """Give memory that nothing refers to back to the device or the operating system."""
    import torch

    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        return
    _trim_heap()


def _trim_heap() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def weight_bytes(components: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes that the weights of every torch module take, shared ones counted once.

    Counted are parameters, buffers, and what kernels of packed layers keep beside them.

    Args:
        components: Name -> component of a pipeline; those that are no torch modules are skipped.
    """
    import torch

    from quantkit_runtime.packed import PackedLayer

    seen: set[tuple[int, int]] = set()
    sizes = {}
    for name, component in components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        size = 0
        for tensor in (*component.parameters(), *component.buffers()):
            key = (tensor.data_ptr(), tensor.nbytes)
            if key not in seen:
                seen.add(key)
                size += tensor.nbytes
        size += sum(layer.extra_bytes for layer in component.modules() if isinstance(layer, PackedLayer))
        sizes[name] = size
    return sizes


def disk_bytes(model: ModelFolder) -> dict[str, int]:
    """Return component -> bytes of its files."""
    return {name: component.nbytes for name, component in model.components.items()}


def quantization_of(model: ModelFolder) -> dict[str, str]:
    """Return component -> scheme in words for every component whose configuration says it is quantized."""
    schemes = {}
    for name, component in model.components.items():
        if (config := component.quantization) is not None:
            group = config.get("group_size")
            schemes[name] = (
                f"W{config.get('bits')}A16, {'one group per channel' if group == -1 else f'group {group}'}, "
                f"{'symmetric' if config.get('sym') else 'asymmetric'}"
            )
    return schemes
