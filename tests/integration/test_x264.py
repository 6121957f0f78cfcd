"""Encoded videos depend on their frames alone."""

import os
import subprocess
import sys

import pytest

# Blocks and noise: something to predict, and something that is not worth it. 480 is no multiple of 128.
_ENCODE = """
import hashlib, sys
from pathlib import Path
import numpy as np
random = np.random.default_rng(0)
blocks = random.integers(0, 128, (5, 8, 8, 3), dtype=np.uint8).repeat(60, 1).repeat(60, 2)
frames = blocks + random.integers(0, 128, blocks.shape, dtype=np.uint8)
if sys.argv[1] == "server":
    from quantkit_runtime.server.media import encode_mp4
    data = encode_mp4(frames, 16)
else:
    from quantkit.generate.media import write_video
    path = Path(sys.argv[2]) / "video.mp4"
    write_video(path, frames, 16)
    data = path.read_bytes()
print(hashlib.sha256(data).hexdigest())
"""


@pytest.mark.parametrize("encoder", ["server", "generate"])
def test_memory_left_by_earlier_work_does_not_change_a_video(encoder, tmp_path):
    """glibc fills new memory with a byte that its environment names; others than glibc take what is there."""
    digests = set()
    for fill in ("0", "1", "85", "170"):
        command = [sys.executable, "-c", _ENCODE, encoder, str(tmp_path)]
        environment = {**os.environ, "MALLOC_PERTURB_": fill}
        digests.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(digests) == 1
