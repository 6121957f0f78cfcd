"""On PYTHONPATH, ends a quantization while its tuning process writes a block, as ``QUANTKIT_TEST_KILL`` says.

``INDEX:before:self`` kills the tuning process when half of that block's file is written, ``INDEX:after:self`` when
it is there. With ``parent`` instead of ``self`` the process that started it is killed. ``memory`` makes the device
run out of memory in the first block, ``disk`` the disk of space.
"""

import errno
import os
import signal
import sys


def end_in_block(index, moment, who):
    from quantkit.quantize import resume

    write = resume._write_durably

    def write_and_end(path, content):
        if not path.name.startswith(f"{int(index):05}-"):
            write(path, content)
            return
        if moment == "before":
            path.with_name(path.name + resume._UNFINISHED).write_bytes(content[: len(content) // 2])
        else:
            write(path, content)
        if who == "parent":
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    resume._write_durably = write_and_end


def run_out_of_memory():
    import torch

    def attend(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    torch.nn.functional.scaled_dot_product_attention = attend


def run_out_of_space():
    from quantkit.quantize import resume

    def write(path, _content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    resume._write_durably = write


if "quantkit.quantize.autoround" in sys.orig_argv:
    match os.environ.get("QUANTKIT_TEST_KILL", "").split(":"):
        case ["memory"]:
            run_out_of_memory()
        case ["disk"]:
            run_out_of_space()
        case [index, moment, who]:
            end_in_block(index, moment, who)
