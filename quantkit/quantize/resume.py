"""Tuned blocks that outlive a run: what the next run to the same output need not tune again.

::

    .OUTPUT.resume/              beside the output, removed when it is published
      <digest of what follows>/
        run.json                 what the blocks were tuned for: scheme, layers, calibration, source, versions
        00000-<sha256>.safetensors
        00001-<sha256>.safetensors

A file holds the packed layers of one block, and in its header the block's loss and the state of the random
generators after it. It gets its name, which carries the hash of its content, when it is complete and on disk; so
a run that is killed leaves a block or nothing. Runs for something else have a folder of their own: what was tuned
for one recipe is neither used for another nor lost to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint import read_header
from quantkit.quantize.hashes import hash_file
from quantkit.quantize.progress import OnNotice
from quantkit_runtime.checkpoint import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Identity = Mapping[str, str | int | float | bool | None]
"""What decides the result of tuning, key by key, e.g. ``{"scheme.lr": 0.1, "versions.torch": "2.14.0"}``."""

_RUN = "run.json"
_UNFINISHED = ".unfinished"
_DIGEST_LETTERS = 16


@dataclass(frozen=True)
class TunedBlock:
    """One block that has been tuned.

    Attributes:
        component: Which part of the pipeline it belongs to.
        name: Its name there.
        loss: Mean squared error of its output before and after; None if nothing in it was to be tuned.
        random: State of the random generators after it, see `random_state`.
    """

    component: str
    name: str
    loss: tuple[float, float] | None
    random: dict[str, Any]


class TunedBlocks:
    """The blocks of one run that are done, in the order of tuning.

    Attributes:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def files(self) -> list[Path]:
        """The file of each block, in the order of tuning."""
        return sorted(self.folder.glob("*.safetensors"))

    def find_tensors(self, component: str) -> dict[str, TensorInfo]:
        """Return where the tensors of a component's tuned blocks are, by name."""
        infos = (item for path in self.files for item in read_header(path).items())
        prefix = f"{component}/"
        return {name.removeprefix(prefix): info for name, info in infos if name.startswith(prefix)}

    def read(self, index: int) -> tuple[TunedBlock, dict[str, Tensor]]:
        """Read a block and its tensors by name.

        Raises:
            IndexError: If it has not been tuned.
        """
        from safetensors import safe_open

        with safe_open(self.files[index], framework="pt") as handle:
            fields = json.loads(handle.metadata()["block"])
            prefix = f"{fields['component']}/"
            tensors = {name.removeprefix(prefix): handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - no mapping
        loss = fields.pop("loss")
        return TunedBlock(loss=loss if loss is None else tuple(loss), **fields), tensors

    def write(self, index: int, block: TunedBlock, tensors: Mapping[str, Tensor]) -> None:
        """Keep a block; when this returns it survives a crash of the machine.

        Raises:
            OSError: If it cannot be written, for example on a full disk.
        """
        from safetensors.torch import save

        prefixed = {f"{block.component}/{name}": tensor for name, tensor in tensors.items()}
        content = save(prefixed, metadata={"block": json.dumps(asdict(block))})
        digest = hashlib.sha256(content).hexdigest()
        _write_durably(self.folder / f"{index:05}-{digest}.safetensors", content)

    def discard(self) -> None:
        """Remove the folder, and the one around it if nothing else is in there."""
        shutil.rmtree(self.folder)
        if not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    def drop_damaged(self) -> Path | None:
        """Remove the first block whose file is not what was written, and all after it.

        Returns:
            The damaged file, or None. Without an earlier block a later one is of no use.
        """
        for index, path in enumerate(self.files):
            number, _, digest = path.stem.partition("-")
            if number != f"{index:05}" or hash_file(path) != digest:
                for later in self.files[index:]:
                    later.unlink()
                return path
        return None


def open_blocks(root: Path, identity: Identity, *, resume: bool, on_notice: OnNotice) -> TunedBlocks:
    """Find what an earlier run tuned for the same thing, or begin anew.

    Args:
        root: Folder that outlives a run.
        identity: What the blocks are tuned for.
        resume: False forgets what an earlier run tuned for the same.
        on_notice: Told in one line what is taken up, or why nothing is.

    Raises:
        OSError: If the folder cannot be read or written.
    """
    text = json.dumps(dict(sorted(identity.items())), indent=1)
    folder = root / hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_LETTERS]
    blocks = TunedBlocks(folder)
    for unfinished in folder.glob(f"*{_UNFINISHED}"):
        unfinished.unlink()
    if not resume:
        for path in blocks.files:
            path.unlink()
    elif damaged := blocks.drop_damaged():
        on_notice(f"{damaged}: is damaged; its block and those after it are tuned again")
    if found := len(blocks.files):
        on_notice(f"going on after {found} tuned {'block' if found == 1 else 'blocks'} of an earlier run")
    elif resume and (other := _newest_other_run(root, folder)):
        on_notice(
            f"starting over: {_describe_change(other, identity)}; the earlier run's blocks are kept in {root}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write_durably(folder / _RUN, text.encode())
    return blocks


def _newest_other_run(root: Path, folder: Path) -> Path | None:
    """Return the description of the run that last left blocks for something else."""
    runs = [path for path in root.glob(f"*/{_RUN}") if path.parent != folder and TunedBlocks(path.parent).files]
    return max(runs, key=lambda path: path.parent.stat().st_mtime, default=None)


def _describe_change(other: Path, identity: Identity) -> str:
    try:
        earlier = json.loads(other.read_text(encoding="utf-8"))
        keys = [key for key in (*identity, *earlier) if _value(earlier, key) != _value(identity, key)]
    except (OSError, ValueError, AttributeError, TypeError):
        return "the earlier run's description is damaged"
    changed = list(dict.fromkeys(keys))
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    key = changed[0]
    return f"{key} changed from {_value(earlier, key)} to {_value(identity, key)}{more}"


def _value(identity: Identity, key: str) -> str:
    return json.dumps(identity[key]) if key in identity else "nothing"


def _write_durably(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + _UNFINISHED)
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def random_state(devices: Iterable[torch.device]) -> dict[str, Any]:
    """Return the state of every random generator that tuning may draw from, as JSON-ready data.

    Args:
        devices: The accelerators in use; the generator of the CPU is always included.
    """
    import random

    import numpy
    import torch

    shared: Any = numpy.random.get_state()
    kind, keys, *rest = shared
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": _to_hex(torch.get_rng_state()),
        "devices": [_to_hex(torch.get_device_module(device).get_rng_state(device)) for device in devices],
    }


def restore_random_state(state: Mapping[str, Any], devices: Iterable[torch.device]) -> None:
    """Put every random generator where `random_state` found it.

    Args:
        state: From `random_state`, of as many devices.
        devices: The accelerators in use.
    """
    import random

    import numpy
    import torch

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_from_hex(state["torch"]))
    for device, text in zip(devices, state["devices"], strict=True):
        torch.get_device_module(device).set_rng_state(_from_hex(text), device)


def _to_hex(state: Tensor) -> str:
    return bytes(state.numpy()).hex()


def _from_hex(text: str) -> Tensor:
    import torch

    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
