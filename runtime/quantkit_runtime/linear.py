"""A Linear layer whose weight stays packed."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit_runtime.config import Scheme
from quantkit_runtime.format import packed_tensors
from quantkit_runtime.kernels import Backend, LinearKernel, LinearSpec, resolve
from quantkit_runtime.packed import PackedLayer


class W4A16Linear(PackedLayer):
    """``y = x @ W.T + bias`` with W stored in a few bits, for inference.

    ``state_dict()`` and `packed` give the checkpoint's tensors, bit for bit, for as long as the layer lives; so do
    the buffers, until a backend that wants another order repacks ``qweight`` in its place, see
    `quantkit_runtime.packed`. With K = in_features, N = out_features, g = group length and the default 4-bit gptq
    packing:

    =======  =======  =============  ====================================
    buffer   dtype    shape          content
    =======  =======  =============  ====================================
    qweight  int32    (K / 8, N)     8 codes a word along K
    qzeros   int32    (K / g, N / 8) 8 zero points a word along N
    scales   float16  (K / g, N)     one scale per group and output
    bias     as read  (N,)           absent if the layer has none
    =======  =======  =============  ====================================

    :mod:`quantkit_runtime.format` has the other packings. ``to(dtype)`` and ``half()`` leave the dtype of every
    buffer alone (float16 scales do not survive bf16); the result has the dtype of the input.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether there is a bias.
        group_size: Input features per group, -1 for one group.
        bits: Width of a code.
        sym: Whether all zero points are the middle of the code range.
        packing_format: Bit layout.
        bias_dtype: Dtype of the bias buffer.
        device: Where to allocate the buffers.

    Raises:
        CheckpointFormatError: The shape does not fit the scheme.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        group_size: int = 128,
        bits: int = 4,
        sym: bool = True,
        packing_format: str = "auto_round:auto_gptq",
        bias_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = Scheme(bits=bits, group_size=group_size, sym=sym, packing_format=packing_format)
        for name, (shape, dtype) in packed_tensors(in_features, out_features, self.scheme).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=bias_dtype, device=device) if bias else None)

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors of the weight by name, as :func:`quantkit_runtime.format.unpack` takes them."""
        return {**self._running(), "qweight": self._stored("qweight", self.in_features)}

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., K), any floating dtype, on the device of the buffers.

        Returns:
            (..., N) in the dtype of ``x``.

        Raises:
            QuantkitRuntimeError: A gradient with respect to ``x`` would be needed.
        """
        out: Tensor = self._ready(x)(x)
        return out

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        scheme = self.scheme
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={scheme.bits}, group_size={scheme.group_size}, sym={scheme.sym}, backend={self.backend}"
        )

    def _running(self) -> dict[str, Tensor]:
        return {"qweight": self.qweight, "qzeros": self.qzeros, "scales": self.scales}

    def _codes(self) -> dict[str, int]:
        return {"qweight": self.in_features}

    def _resolve(self, dtype: torch.dtype, compute: str, backend: str) -> tuple[Backend, LinearSpec]:
        spec = LinearSpec(self.in_features, self.out_features, self.scheme, self.qweight.device, dtype, compute)
        return resolve("linear", spec, backend), spec

    def _make_kernel(self, backend: Backend, spec: LinearSpec) -> LinearKernel:
        kernel: LinearKernel = backend.prepare(spec, self._running(), self.bias)
        return kernel
