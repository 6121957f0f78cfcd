"""Atomic publishing: all work happens in a folder beside the output, which then takes the output's name.

Killed at any moment, the output path holds what it held before or the complete new result, and the next run
to the same output clears what was left behind. A lock on the staging folder, which the kernel drops with its
process, tells leftovers from a run in progress. What a run keeps for the next one, should it fail, is in a folder
beside the output too, which only the run that holds the lock may touch; publishing removes it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantkit.errors import OutputError


class Staging:
    """A folder beside the output in which it comes into being.

    Attributes:
        output: Where the result will be.
        content: The folder that becomes the output.
        work: For files that are not part of it.
        kept: Folder that outlives a failed run and is removed by `publish`; it is made by who needs it.
    """

    def __init__(self, output: Path, folder: Path) -> None:
        self.output = output
        self.content = folder / "content"
        self.work = folder / "work"
        self.kept = output.with_name(f".{output.name}.resume")
        self.content.mkdir()
        self.work.mkdir()

    def publish(self, *, overwrite: bool, content: Path | None = None) -> None:
        """Give the finished content the output's name.

        Args:
            overwrite: Replace an existing output; it is removed only after the new one is in place.
            content: What becomes the output where that is not the folder ``content``, e.g. a file in ``work``.

        Raises:
            OutputError: If the output has come into being meanwhile and overwrite is off.
        """
        content = content or self.content
        _sync(content)
        replaced: Path | None = None
        if os.path.lexists(self.output):
            if not overwrite:
                raise OutputError(f"{self.output}: exists by now; give another --output or --overwrite")
            replaced = Path(tempfile.mkdtemp(prefix=_prefix(self.output, "replaced"), dir=self.output.parent))
            self.output.rename(replaced / "output")
        content.rename(self.output)
        _sync_entry(self.output.parent)
        if replaced is not None:
            shutil.rmtree(replaced)
        if self.kept.exists():
            shutil.rmtree(self.kept)


@contextmanager
def stage(output: Path, *, overwrite: bool, need_bytes: int, marker: str | None = None) -> Iterator[Staging]:
    """Open a staging folder for an output, and remove it at the end whatever happens.

    Args:
        output: Where the result is to be; its parent folders are made.
        overwrite: Whether an existing output may be replaced.
        need_bytes: Free space that the run needs.
        marker: File by which a folder shows that it is such an output; only a folder that holds it, or an empty
            one, is ever replaced.

    Raises:
        OutputError: If the output exists and may not be replaced, cannot be written, lacks space, or another run is
            writing it.
    """
    parent = output.parent
    made: list[Path] = []
    folder: Path | None = None
    lock = -1
    try:
        made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        with _locked(parent):  # until the staging folder is locked itself, it looks like a leftover
            _clear_leftovers(output)
            _check_replaceable(output, overwrite, marker)
            _check_space(output, need_bytes)
            folder = Path(tempfile.mkdtemp(prefix=_prefix(output, "staging"), dir=parent))
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield Staging(output, folder)
        made = []
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise OutputError(f"{output}: cannot be written: {os.strerror(error.errno)}") from error
        unusable = {errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY}
        if error.errno in unusable or (error.errno == errno.ENOENT and folder is None):
            raise OutputError(f"{output}: is no usable path: {os.strerror(error.errno)}") from error
        raise
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if lock >= 0:
            os.close(lock)
        for empty in made:
            if empty.exists() and not any(empty.iterdir()):
                empty.rmdir()


def _check_replaceable(output: Path, overwrite: bool, marker: str | None) -> None:
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise OutputError(f"{output}: exists; give another --output or --overwrite")
    if marker is None or (output / marker).is_file():
        return
    if not output.is_dir() or any(output.iterdir()):
        raise OutputError(f"{output}: holds no {marker}, so it is not replaced; give another --output")


def _check_space(output: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if free < need_bytes:
        raise OutputError(
            f"{output}: needs {need_bytes / 1e9:.2f} GB of free space, has {free / 1e9:.2f} GB; "
            "free some or give another --output"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _prefix(output: Path, kind: str) -> str:
    return f".{output.name}.{kind}-"


def _clear_leftovers(output: Path) -> None:
    """Undo what a killed run left: put back an output it was replacing, remove its staging folder."""
    # First the staging folders: while another run holds one, what it is replacing must stay where it is.
    for folder in output.parent.glob(f"{glob.escape(_prefix(output, 'staging'))}*"):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{output}: another run is writing it; wait for it or end it") from None
        else:
            shutil.rmtree(folder)
        finally:
            os.close(descriptor)
    for replaced in output.parent.glob(f"{glob.escape(_prefix(output, 'replaced'))}*"):
        held = replaced / "output"
        if os.path.lexists(held) and not os.path.lexists(output):
            held.rename(output)
        shutil.rmtree(replaced)


def _sync(folder: Path) -> None:
    """Bring every file and folder below to disk, so that a rename cannot outrun the data."""
    for path in [*folder.rglob("*"), folder]:
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
