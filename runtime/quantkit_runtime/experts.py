"""The experts of a mixture-of-experts layer, their weights packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit_runtime.config import Scheme
from quantkit_runtime.format import PACKED_SUFFIXES, packed_tensors
from quantkit_runtime.kernels import Backend, ExpertsKernel, ExpertsSpec, backends, resolve
from quantkit_runtime.packed import PackedLayer

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The three Linears of an expert, by their names in a checkpoint."""


class W4A16Experts(PackedLayer):
    """``sum over a token's experts e of weight_e * down_e(act(gate_e(x)) * up_e(x))``, for inference.

    Takes the place of transformers' module of fused experts and its arguments. With E experts, H = hidden size,
    I = intermediate size, g = group length and the default 4-bit gptq packing:

    ================  =======  =================  =================================================
    buffer            dtype    shape              content
    ================  =======  =================  =================================================
    gate_up_qweight   int32    (E, H / 8, 2 I)    8 codes a word along H; gate in the first I columns
    gate_up_qzeros    int32    (E, H / g, I / 4)  8 zero points a word along the columns
    gate_up_scales    float16  (E, H / g, 2 I)    one scale per group and column
    down_qweight      int32    (E, I / 8, H)      likewise
    down_qzeros       int32    (E, I / g, H / 8)
    down_scales       float16  (E, I / g, H)
    ================  =======  =================  =================================================

    ``state_dict()`` gives the checkpoint's own tensors, ``<expert>.gate_proj.qweight`` and so on, as views into
    these buffers; `load_state_dict` takes them. A backend that wants the codes in another order repacks the
    ``qweight`` in their place (`quantkit_runtime.packed`); then those that ``state_dict()`` gives are copies.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        scheme: How every one of the Linears is stored.
        activation: Applied to what the gate gives.
        device: Where to allocate the buffers; they are not initialised.

    Raises:
        CheckpointFormatError: The sizes do not fit the scheme.
    """

    gate_up_qweight: Tensor

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        scheme: Scheme,
        activation: Callable[[Tensor], Tensor],
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.scheme = scheme
        self.activation = activation
        packed_tensors(hidden_size, intermediate_size, scheme)  # gate and up must fit one by one
        sizes = {"gate_up": (hidden_size, 2 * intermediate_size), "down": (intermediate_size, hidden_size)}
        for name, (in_features, out_features) in sizes.items():
            for suffix, (shape, dtype) in packed_tensors(in_features, out_features, scheme).items():
                stack = torch.empty((num_experts, *shape), dtype=dtype, device=device)
                self.register_buffer(f"{name}_{suffix}", stack)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply to every token the experts it is sent to.

        Args:
            hidden_states: (T, H), any floating dtype, on the device of the buffers.
            top_k_index: (T, k) int64, the experts of each token; E means none.
            top_k_weights: (T, k), the weight of each.

        Returns:
            (T, H) in the dtype of ``hidden_states``.

        Raises:
            QuantkitRuntimeError: A gradient with respect to ``hidden_states`` would be needed.
        """
        out: Tensor = self._ready(hidden_states)(hidden_states, top_k_index, top_k_weights)
        return out

    def packed(self, name: str) -> dict[str, Tensor]:
        """Return the stacks of ``gate_up`` or ``down`` by suffix, in the checkpoint's layout."""
        codes = f"{name}_qweight"
        return {**self._running(name), "qweight": self._stored(codes, self._codes()[codes])}

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        scheme = self.scheme
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, bits={scheme.bits}, group_size={scheme.group_size}, "
            f"sym={scheme.sym}, backend={self.backend}"
        )

    def _running(self, name: str) -> dict[str, Tensor]:
        return {suffix: self.get_buffer(f"{name}_{suffix}") for suffix in PACKED_SUFFIXES}

    def _codes(self) -> dict[str, int]:
        return {"gate_up_qweight": self.hidden_size, "down_qweight": self.intermediate_size}

    def _resolve(self, dtype: torch.dtype, compute: str, backend: str) -> tuple[Backend, ExpertsSpec]:
        spec = ExpertsSpec(
            self.num_experts,
            self.hidden_size,
            self.intermediate_size,
            self.scheme,
            self.activation,
            self.gate_up_qweight.device,
            dtype,
            compute,
        )
        if backend not in {known.name for known in backends("experts")}:
            backend = "auto"  # one that has kernels for Linear layers only
        return resolve("experts", spec, backend), spec

    def _make_kernel(self, backend: Backend, spec: ExpertsSpec) -> ExpertsKernel:
        kernel: ExpertsKernel = backend.prepare(spec, self._running("gate_up"), self._running("down"))
        return kernel

    def _views(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the checkpoint by name, as a view into the buffers."""
        gate_up, down = self.packed("gate_up"), self.packed("down")
        for expert in range(self.num_experts):
            for suffix in PACKED_SUFFIXES:
                gate, up = gate_up[suffix][expert].chunk(2, dim=-1)
                for projection, view in zip(PROJECTIONS, (gate, up, down[suffix][expert]), strict=True):
                    yield f"{expert}.{projection}.{suffix}", view

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        del keep_vars  # buffers have no gradient
        destination.update((prefix + name, view) for name, view in self._views())

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        del local_metadata
        self._arrange("stored")
        views = {prefix + name: view for name, view in self._views()}
        for name, view in views.items():
            if name not in state_dict:
                missing_keys += [name] * strict
                continue
            tensor = state_dict[name]
            if (tensor.shape, tensor.dtype) != (view.shape, view.dtype):
                error_msgs.append(
                    f"{name}: {tuple(tensor.shape)} {tensor.dtype} where {tuple(view.shape)} {view.dtype} is needed"
                )
                continue
            view.copy_(tensor)
        unexpected_keys += [name for name in state_dict if strict and name.startswith(prefix) and name not in views]
        self._reset()
