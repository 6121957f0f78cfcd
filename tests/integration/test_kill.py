"""kill -9 at random moments: the output path holds nothing, the old or the new checkpoint, never a part of one."""

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantkit.quantize.hashes import hash_file
from quantkit.quantize.verify import verify

# Imports once, then forks for each command line it reads: the child runs the real command line from its start.
SERVER = """
import json, os, sys
import torch, diffusers, transformers
from diffusers import FluxTransformer2DModel
import quantkit.quantize.run, quantkit.cli.main
for line in sys.stdin:
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        arguments, environment = json.loads(line)
        os.environ.update(environment)
        sys.argv = ["quantkit", *arguments]
        try:
            quantkit.cli.main.main()
        except SystemExit as end:
            os._exit(end.code or 0)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
KILLER = Path(__file__).parent / "killer"
RTN_KILLS = 10
TUNED_KILLS = 10


class Quantizer:
    def __init__(self, recipe, model, output):
        self.output = output
        self.arguments = ["quantize", "-r", str(recipe), "-m", str(model), "-o", str(output), "--device", "cpu"]
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, *options, kill_after_s=None, **environment):
        """Run once; kill it after a while. Return its exit code and how long it ran."""
        self.server.stdin.write(json.dumps([[*self.arguments, *options], environment]).encode() + b"\n")
        self.server.stdin.flush()
        child = int(self.server.stdout.readline())
        began = time.monotonic()
        ended, _, _ = select.select([self.server.stdout], [], [], kill_after_s)
        if not ended:
            os.kill(child, signal.SIGKILL)
        code = int(self.server.stdout.readline())
        return code, time.monotonic() - began

    def survivors(self):
        """Return the command lines of processes that still work in a folder beside the output."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = entry.read_bytes().decode(errors="replace")
                if f"{self.output.parent}/.{self.output.name}.staging-" in line:
                    found.append(line)
        return found


@pytest.fixture
def quantizer(quantize_tiny, flux_model, tmp_path):
    made = Quantizer(quantize_tiny.recipe, flux_model, tmp_path / "out")
    yield made
    made.server.stdin.close()
    made.server.kill()
    made.server.wait()
    made.server.stdout.close()


def moments(count, duration_s):
    """Return one random moment out of each of so many equal parts of a duration."""
    generator = random.Random(7)
    return [(index + generator.random()) * duration_s / count for index in range(count)]


def wait_until_gone(quantizer):
    deadline = time.monotonic() + 15
    while quantizer.survivors() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert quantizer.survivors() == []


def kill_repeatedly(quantizer, options, duration_s, kills, allowed):
    """Kill runs at moments spread over their duration; return what each left at the output path."""
    left = []
    for moment in moments(kills, duration_s):
        quantizer.run(*options, kill_after_s=moment)
        wait_until_gone(quantizer)
        if quantizer.output.exists():
            assert verify(quantizer.output).problems == []
            left.append(bits_of(quantizer.output))
        else:
            left.append(None)
        assert left[-1] in allowed
        if None in allowed and left[-1] is not None:
            subprocess.run(["rm", "-r", quantizer.output], check=True)
    return left


def bits_of(checkpoint):
    return json.loads((checkpoint / "transformer" / "config.json").read_text())["quantization_config"]["bits"]


def test_killed_rounding_never_leaves_a_part_and_the_next_run_succeeds(quantizer, tmp_path):
    quantizer.run()  # the first one warms the disk's cache
    subprocess.run(["rm", "-r", quantizer.output], check=True)
    code, duration_s = quantizer.run()
    assert code == 0
    subprocess.run(["rm", "-r", quantizer.output], check=True)
    left = kill_repeatedly(quantizer, (), duration_s, RTN_KILLS, {None, 4})
    assert None in left
    assert quantizer.run("--overwrite")[0] == 0
    assert verify(quantizer.output).problems == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_overwriting_leaves_the_old_or_the_new_checkpoint(quantizer, tmp_path):
    assert quantizer.run()[0] == 0
    options = ("--overwrite", "--set", "scheme.bits=8")
    code, duration_s = quantizer.run(*options)
    assert code == 0
    assert quantizer.run("--overwrite")[0] == 0
    left = kill_repeatedly(quantizer, options, duration_s, RTN_KILLS, {4, 8})
    assert 4 in left
    assert quantizer.run(*options)[0] == 0
    assert bits_of(quantizer.output) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_tuning_leaves_no_part_and_no_process_and_ends_with_the_same_bytes(quantizer, tmp_path):
    options = ("--set", "scheme.iters=2", "--set", "scheme.lr=0.3")
    code, duration_s = quantizer.run(*options)
    assert code == 0
    uninterrupted = hash_weights(quantizer.output)
    subprocess.run(["rm", "-r", quantizer.output], check=True)
    left = kill_repeatedly(quantizer, options, duration_s, TUNED_KILLS, {None, 4})
    assert None in left
    assert quantizer.run("--overwrite", *options)[0] == 0
    assert verify(quantizer.output).problems == []
    assert hash_weights(quantizer.output) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_while_a_block_is_tuned_the_next_run_goes_on_after_the_last_one(quantizer, tmp_path):
    options = ("--set", "scheme.iters=2", "--set", "scheme.lr=0.3")
    assert quantizer.run(*options)[0] == 0
    uninterrupted = hash_weights(quantizer.output)
    subprocess.run(["rm", "-r", quantizer.output], check=True)
    path = os.pathsep.join(filter(None, (str(KILLER), os.environ.get("PYTHONPATH"))))
    code, _ = quantizer.run(*options, PYTHONPATH=path, QUANTKIT_TEST_KILL="2:before:parent")
    assert code == -signal.SIGKILL
    wait_until_gone(quantizer)
    kept = sorted((tmp_path / ".out.resume").rglob("*.safetensors"))
    assert [block.name[:5] for block in kept] == ["00000", "00001"]
    assert quantizer.run(*options)[0] == 0
    assert json.loads((quantizer.output / "quantkit.json").read_text())["run"]["resumed_blocks"] == len(kept)
    assert hash_weights(quantizer.output) == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def hash_weights(checkpoint):
    return {path.relative_to(checkpoint): hash_file(path) for path in checkpoint.rglob("*.safetensors")}
