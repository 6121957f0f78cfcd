"""What layers with packed weights have in common: buffers that keep their dtype, a kernel chosen once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from quantkit_runtime.config import Scheme
from quantkit_runtime.errors import CheckpointFormatError, QuantkitRuntimeError
from quantkit_runtime.kernels import Backend, resolve_compute
from quantkit_runtime.kernels.tiles import from_tiles, to_tiles


class PackedLayer(nn.Module):
    """A layer for inference whose weights stay packed.

    Its buffers are the checkpoint's tensors. A backend may want the codes in another order; then they are repacked
    in their place when it is chosen, and what leaves the layer (``state_dict()``, ``packed()``) is repacked on its
    way.
    ``to(dtype)`` and ``half()`` leave the dtype of every buffer alone: float16 scales do not survive bf16.
    """

    scheme: Scheme

    def __init__(self) -> None:
        super().__init__()
        self._layout = "stored"
        self.backend: str | None = None
        """Name of the backend in use; None until the layer is prepared."""
        self._request: tuple[torch.dtype, str, str] = (torch.bfloat16, "auto", "auto")
        self._kernel: Any = None

    @abstractmethod
    def _resolve(self, dtype: torch.dtype, compute: str, backend: str) -> tuple[Backend, Any]:
        """Return the backend to use and the spec that it was chosen for."""

    @abstractmethod
    def _make_kernel(self, backend: Backend, spec: Any) -> Any:
        """Let a backend make its kernel from the buffers, which are in its layout."""

    @abstractmethod
    def _codes(self) -> Mapping[str, int]:
        """Return the names of the buffers that hold codes, with the input features of the weight."""

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
        chosen, spec = self._resolve(dtype, resolve_compute(compute), backend)
        self._reset()
        self._arrange(chosen.layout)
        self.backend, self._kernel = chosen.name, self._make_kernel(chosen, spec)

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

    def _arrange(self, layout: str) -> None:
        """Repack the codes."""
        if layout == self._layout:
            return
        for name, in_features in self._codes().items():
            codes = self.get_buffer(name)
            tiled = layout == "tiles"
            setattr(self, name, to_tiles(codes, self.scheme) if tiled else self._stored(name, in_features))
        self._layout = layout

    def _stored(self, name: str, in_features: int) -> Tensor:
        """Return a buffer of codes as the checkpoint has it."""
        codes = self.get_buffer(name)
        return codes if self._layout == "stored" else from_tiles(codes, self.scheme, in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the buffers, but never change their dtype."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        before = next(self.buffers())
        super()._apply(move, recurse)  # type: ignore[no-untyped-call]  # torch gives it no types
        if next(self.buffers()) is not before:
            self._reset()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._layout != "stored":
            destination.update((prefix + name, self._stored(name, size)) for name, size in self._codes().items())

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self._arrange("stored")
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._reset()
