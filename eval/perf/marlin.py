"""Marlin, IST-DASLab's kernel of fp16 activations and 4-bit weights: compiled, its weights packed, called.

Its source is one CUDA file that is not part of this repository: ``marlin/marlin_cuda_kernel.cu`` of the repository
IST-DASLab/marlin, also in the source distribution of auto-gptq 0.7.1, in ``autogptq_extension/marlin``. It is
compiled without torch's headers and without its hint to the cache, which a Hopper GPU stops at, and needs nvcc and
compute capability 8.0. ::

    kernel = load(Path("marlin_cuda_kernel.cu"), device)
    weight = MarlinWeight.of(codes, scales)
    out = kernel(x, weight, locks_for(weight.out_features, device))

Legend: M = rows, K = in_features, N = out_features, G = groups = K / 128, or 1 for one scale in each column.

======  =======  ============  ===================================================================================
codes   int32    (K / 16, 2N)  a word has eight codes of one lane, see `pack_codes`
scales  float16  (G, N)        the order of columns is changed within each 64, see `permute_scales`
locks   int32    (N / 8,)      zero before each call, and again after it
======  =======  ============  ===================================================================================
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit_runtime.bitstream import pack_words

GROUP = 128
_LEAST_CAPABILITY = (8, 0)
_TILE_K, _TILE_N = 128, 256
_MOST_PARALLEL = 16  # blocks of 64 rows that one launch takes, Marlin's own choice
_LEAST_LOCK_COLUMNS = 128  # of a thread block, which has a lock for each of those blocks

# The function has C++ linkage, and errors of a launch are not among those that it returns.
_WRAPPER = """
#include "{source}"

extern "C" const char* marlin_product(
    const void* x, const void* codes, void* out, void* scales, int rows, int out_features, int in_features,
    void* locks, int group, int device, void* stream, int most_parallel) {{
  int refused = marlin_cuda(x, codes, out, scales, rows, out_features, in_features, locks, group, device,
                            static_cast<cudaStream_t>(stream), -1, -1, -1, most_parallel);
  if (refused)
    return refused == ERR_PROB_SHAPE ? "the shape does not fit the tiles" : "no kernel has these tiles";
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}}
"""
# Weights are read once and should leave the cache first; the two instructions are illegal on an H200.
_HINT = ("createpolicy.fractional.L2::evict_first.b64 p, 1.0;", ".L2::cache_hint [%0], [%1], %2, p;")
_NO_HINT = ("", " [%0], [%1], %2;")
# The copy in auto-gptq includes a header that it does not need, and that is not in its source distribution.
_EMPTY_HEADER = "marlin_cuda_kernel.cuh"
_FLAGS = (
    "-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC",
    "--expt-relaxed-constexpr",  # ceildiv is constexpr, and neither __host__ nor __device__
    "--disable-warnings",
)  # fmt: skip


class MarlinError(RuntimeError):
    """Marlin cannot be compiled, or refuses a product."""


def why_not(in_features: int, out_features: int) -> str | None:
    """Return why Marlin cannot multiply by a weight of this shape, None where it can."""
    if in_features % _TILE_K:
        return f"in_features {in_features} is not a multiple of {_TILE_K}"
    if out_features % _TILE_N:
        return f"out_features {out_features} is not a multiple of {_TILE_N}"
    return None


@dataclass(frozen=True)
class MarlinWeight:
    """One symmetric weight as Marlin reads it.

    Attributes:
        codes: (K / 16, 2N) int32.
        scales: (G, N) float16, the columns as `permute_scales` orders them.
    """

    codes: Tensor
    scales: Tensor

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor) -> MarlinWeight:
        """Pack a weight ``scale * (code - 8)``.

        Args:
            codes: (N, K), any integer dtype, values in [0, 16).
            scales: (K / 128, N) or (1, N) float16.

        Raises:
            MarlinError: Marlin has no kernel for this shape or these groups.
        """
        out_features, in_features = codes.shape
        refused = why_not(in_features, out_features)
        if refused:
            raise MarlinError(refused)
        if tuple(scales.shape) not in ((in_features // GROUP, out_features), (1, out_features)):
            raise MarlinError(f"scales {tuple(scales.shape)} are neither by groups of {GROUP} nor by column")
        return cls(pack_codes(codes), permute_scales(scales))

    @property
    def out_features(self) -> int:
        """Return N."""
        return self.scales.shape[1]

    def with_random_codes(self, generator: torch.Generator) -> MarlinWeight:
        """Return a weight of the same shape in memory of its own, with other codes: enough to measure times."""
        codes = torch.empty_like(self.codes)
        codes.view(torch.uint8).random_(0, 256, generator=generator)
        return MarlinWeight(codes, self.scales.clone())


def pack_codes(codes: Tensor) -> Tensor:
    """Order codes (N, K) as lanes take them, and pack them: (K / 16, 2N) int32.

    A warp reads 16 rows of K and a block of 64 columns as 16 bytes of each lane. Their four words are the lane's
    codes of four tiles of 16 columns, and a tile is two B operands of mma.m16n8k16, left and right. Of such an
    operand, lane 4 * column + pair holds rows 2 * pair and 2 * pair + 1, and the same 8 rows below. To make two
    fp16 numbers from a word by one mask, the two rows of a pair lie 16 bits apart; bits 0 to 15 thus hold the even
    rows: left upper, left lower, right upper, right lower.
    """
    out_features, in_features = codes.shape
    steps = in_features // 16
    # Block, tile, operand, column; step, half, pair, row of the pair.
    parts = codes.reshape(out_features // 64, 4, 2, 8, steps, 2, 4, 2)
    # Step, block, lane as column and pair, tile; in a word row of the pair, operand, half.
    ordered = parts.permute(4, 0, 3, 6, 1, 7, 2, 5)
    return pack_words(ordered.reshape(steps, 16 * out_features), 4)


def permute_scales(scales: Tensor) -> Tensor:
    """Order scales (G, N) as lanes take them, eight at once; the result has the same shape and is contiguous.

    Scales of groups multiply the B operands, of which a lane has one column each (see `pack_codes`): its eight
    scales are those of the eight operands of a block. A single scale of a column multiplies the results. Of the
    16 x 8 results of an operand a lane has the two columns that its number modulo 4 tells: eight scales are those
    of two tiles, and it reads twice.
    """
    groups, out_features = scales.shape
    if groups == 1:
        pairs = scales.reshape(out_features // 64, 2, 2, 2, 4, 2)  # block, two tiles, tile, operand, pair, column
        return pairs.permute(0, 1, 4, 2, 3, 5).reshape(groups, out_features)
    columns = scales.reshape(groups, out_features // 64, 4, 2, 8)  # group, block, tile, operand, column
    return columns.permute(0, 1, 4, 2, 3).reshape(groups, out_features)


def locks_for(out_features: int, device: torch.device) -> Tensor:
    """Return what thread blocks that add to the same results wait by; one call at a time may use it."""
    count = out_features // _LEAST_LOCK_COLUMNS * _MOST_PARALLEL
    return torch.zeros(count, dtype=torch.int32, device=device)


class Kernel:
    """The compiled kernel.

    Args:
        library: As `build` wrote it; the file may go once it is loaded.
    """

    def __init__(self, library: Path) -> None:
        function = ctypes.CDLL(str(library)).marlin_product
        pointer, number = ctypes.c_void_p, ctypes.c_int
        function.argtypes = [*[pointer] * 4, *[number] * 3, pointer, number, number, pointer, number]
        function.restype = ctypes.c_char_p
        self._product: Callable[..., bytes | None] = function

    def __call__(self, x: Tensor, weight: MarlinWeight, locks: Tensor) -> Tensor:
        """Multiply on the current stream, without waiting; a CUDA graph can capture it after a first call.

        Args:
            x: (M, K) float16, contiguous.
            weight: On the device of ``x``, as is all else.
            locks: Of `locks_for`.

        Returns:
            (M, N) float16.

        Raises:
            MarlinError: Marlin refuses, or the launch fails.
        """
        rows, in_features = x.shape
        if x.dtype != torch.float16 or not x.is_contiguous() or in_features != 16 * len(weight.codes):
            raise MarlinError(f"activations {tuple(x.shape)} {x.dtype} where contiguous float16 is expected")
        out = torch.empty(rows, weight.out_features, dtype=torch.float16, device=x.device)
        stream = torch.cuda.current_stream(x.device)
        failure = self._product(
            x.data_ptr(), weight.codes.data_ptr(), out.data_ptr(), weight.scales.data_ptr(),
            rows, weight.out_features, in_features, locks.data_ptr(), -1 if len(weight.scales) == 1 else GROUP,
            stream.device_index, stream.cuda_stream, _MOST_PARALLEL,
        )  # fmt: skip
        if failure is not None:
            raise MarlinError(failure.decode())
        return out


def load(source: Path, device: torch.device) -> Kernel:
    """Compile Marlin's source for a device, some ten seconds, and load it.

    Raises:
        MarlinError: The device is not CUDA's or too old, or the source cannot be compiled.
    """
    if device.type != "cuda":
        raise MarlinError("needs a CUDA device")
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        raise MarlinError(f"needs compute capability 8.0, and the device has {capability[0]}.{capability[1]}")
    with tempfile.TemporaryDirectory() as folder:
        return Kernel(build(source, Path(folder), capability))


def build(source: Path, folder: Path, capability: tuple[int, int]) -> Path:
    """Compile Marlin's source into a shared library.

    Args:
        source: ``marlin_cuda_kernel.cu``.
        folder: Where to write the library and what leads to it.
        capability: Compute capability of the device, e.g. (9, 0).

    Returns:
        The library, which exports ``marlin_product`` to C.

    Raises:
        MarlinError: There is no such file or no nvcc, or nvcc fails.
    """
    if not source.is_file():
        raise MarlinError(f"{source}: no such file")
    compiler = shutil.which("nvcc")
    if compiler is None:
        raise MarlinError("nvcc is not in PATH")
    (folder / _EMPTY_HEADER).touch()
    code = source.read_text(encoding="utf-8")
    for hint, without in zip(_HINT, _NO_HINT, strict=True):
        code = code.replace(hint, without)
    mended, wrapper, library = (folder / name for name in ("mended.cu", "marlin_product.cu", "marlin_product.so"))
    mended.write_text(code, encoding="utf-8")
    wrapper.write_text(_WRAPPER.format(source=mended), encoding="utf-8")
    architecture = f"-arch=sm_{capability[0]}{capability[1]}"
    command = [compiler, *_FLAGS, architecture, "-I", str(folder), "-o", str(library), str(wrapper)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr + done.stdout).splitlines()
        told = next((line for line in lines if "error" in line), lines[0] if lines else "")
        raise MarlinError(f"nvcc: {told.strip()}")
    return library
