"""What makes x264 encode the same frames to the same bytes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


@cache
def steady_options() -> dict[str, str]:
    """Return options of libx264 under which a video depends on its frames alone.

    The macroblock tree of x264 (core 165) in AVX-512 works on eight macroblocks at a time, and where a width is no
    multiple of 128, takes what is missing at the end of a row from memory that nobody wrote: what other work left
    there changes the picture, some pixels by dozens of levels. Its AVX2 code does not, is as fast, and gives what
    processors without AVX-512 give. It must not be asked for where it cannot run; what has AVX-512 has AVX2.
    """
    try:
        flags = _CPU_INFO.read_text().split()
    except OSError:  # not Linux
        return {}
    return {"x264-params": "asm=AVX2"} if "avx512f" in flags else {}
