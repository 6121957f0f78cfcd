"""What layers with packed weights have in common: buffers that keep their dtype, a kernel chosen once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from quantkit_runtime.errors import CheckpointFormatError, QuantkitRuntimeError
from quantkit_runtime.kernels import resolve_compute


class PackedLayer(nn.Module):
    """A layer for inference whose weights stay packed.

    Its buffers are the checkpoint's tensors for as long as it lives, whatever a kernel backend keeps beside them.
    ``to(dtype)`` and ``half()`` leave the dtype of every buffer alone: float16 scales do not survive bf16.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backend: str | None = None
        """Name of the backend in use; None until the layer is prepared."""
        self._request: tuple[torch.dtype, str, str] = (torch.bfloat16, "auto", "auto")
        self._kernel: Any = None

    @abstractmethod
    def _choose(self, dtype: torch.dtype, compute: str, backend: str) -> tuple[str, Any]:
        """Return the name of the backend to use and its kernel."""

    def prepare(self, dtype: torch.dtype = torch.bfloat16, *, compute: str = "auto", backend: str = "auto") -> None:
        """Choose the kernel backend and let it repack what it wants.

        Runs by itself, with the last arguments given, in the first forward pass after the weights were loaded or
        moved to another device; calling it beforehand keeps that work out of the forward pass, which
        ``torch.compile`` needs.

        Args:
            dtype: Dtype that most activations will have; others work, possibly slower.
            compute: ``"auto"``, ``"16bit"`` or ``"fp8"``.
            backend: ``"auto"`` or the name of one.

        Raises:
            BackendUnavailableError: The backend cannot serve this layer here.
        """
        if next(self.buffers()).device.type == "meta":
            raise CheckpointFormatError(
                f"{type(self).__name__}: its weights were never loaded (they are on the meta device)"
            )
        self._request = (dtype, compute, backend)
        self.backend, self._kernel = self._choose(dtype, resolve_compute(compute), backend)

    @property
    def extra_bytes(self) -> int:
        """Bytes that the kernel keeps in memory beside the buffers; 0 until the layer is prepared."""
        return 0 if self._kernel is None else int(self._kernel.extra_bytes)

    def _ready(self, x: Tensor) -> Any:
        """Return the kernel for an input."""
        if x.requires_grad and torch.is_grad_enabled():
            raise QuantkitRuntimeError(
                f"{type(self).__name__}: packed layers have no backward pass; run the model under "
                "torch.inference_mode() or torch.no_grad()"
            )
        if self._kernel is None:
            dtype, compute, backend = self._request
            self.prepare(dtype, compute=compute, backend=backend)
        return self._kernel

    def _reset(self) -> None:
        self._kernel = None
        self.backend = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the buffers, but never change their dtype."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        before = next(self.buffers())
        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if next(self.buffers()) is not before:
            self._reset()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._reset()
