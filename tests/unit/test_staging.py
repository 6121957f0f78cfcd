"""Publishing is all or nothing, and what a killed run leaves is cleared by the next."""

import errno
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from quantkit.errors import OutputError
from quantkit.staging import stage


def fill(staging, text="new"):
    (staging.content / "sub").mkdir()
    (staging.content / "sub" / "file").write_text(text)
    (staging.work / "log").write_text("log")


def fill_and_fail(output, error, *, overwrite=False):
    with stage(output, overwrite=overwrite, need_bytes=0) as staging:
        fill(staging)
        raise error


def entries(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_published_checkpoint_is_all_that_is_left(tmp_path):
    with stage(tmp_path / "a" / "b" / "out", overwrite=False, need_bytes=0) as staging:
        fill(staging)
        assert not staging.output.exists()
        staging.publish(overwrite=False)
    assert entries(tmp_path) == ["a", "a/b", "a/b/out", "a/b/out/sub", "a/b/out/sub/file"]


def test_an_error_leaves_nothing_behind_not_even_new_parent_folders(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fill_and_fail(tmp_path / "a" / "b" / "out", ZeroDivisionError())
    assert entries(tmp_path) == []


def test_an_existing_output_is_refused_and_not_touched(tmp_path):
    out = tmp_path / "out"
    out.write_text("precious")
    with (
        pytest.raises(OutputError, match="out: exists; give another --output or --overwrite"),
        stage(out, overwrite=False, need_bytes=0),
    ):
        pytest.fail("was entered")  # pragma: no cover
    assert entries(tmp_path) == ["out"]
    assert out.read_text() == "precious"


def test_an_output_that_comes_into_being_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with stage(out, overwrite=False, need_bytes=0) as staging:
        out.write_text("precious")
        with pytest.raises(OutputError, match="exists by now"):
            staging.publish(overwrite=False)
    assert entries(tmp_path) == ["out"]
    assert out.read_text() == "precious"


def test_overwrite_replaces_the_whole_output(tmp_path):
    out = tmp_path / "out"
    (out / "old").mkdir(parents=True)
    with stage(out, overwrite=True, need_bytes=0) as staging:
        fill(staging)
        assert entries(out) == ["old"]
        staging.publish(overwrite=True)
    assert entries(tmp_path) == ["out", "out/sub", "out/sub/file"]


def test_a_failed_run_with_overwrite_keeps_the_old_output(tmp_path):
    out = tmp_path / "out"
    (out / "old").mkdir(parents=True)
    with pytest.raises(ZeroDivisionError):
        fill_and_fail(out, ZeroDivisionError(), overwrite=True)
    assert entries(tmp_path) == ["out", "out/old"]


@pytest.mark.parametrize("name", ["out", "out[1]", "*"])
def test_leftovers_of_a_killed_run_are_cleared_and_those_of_other_outputs_kept(tmp_path, name):
    for folder in (f".{name}.staging-abc/checkpoint", ".other.staging-abc/checkpoint"):
        (tmp_path / folder).mkdir(parents=True)
    with stage(tmp_path / name, overwrite=False, need_bytes=0) as staging:
        staging.publish(overwrite=False)
    assert entries(tmp_path) == sorted([".other.staging-abc", ".other.staging-abc/checkpoint", name])


def test_an_output_that_was_being_replaced_when_the_run_was_killed_comes_back(tmp_path):
    held = tmp_path / ".out.replaced-abc" / "output"
    held.mkdir(parents=True)
    (held / "file").write_text("old")
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="exists"), stage(out, overwrite=False, need_bytes=0):
        pytest.fail("was entered")  # pragma: no cover
    assert entries(tmp_path) == ["out", "out/file"]


def test_an_output_that_had_been_replaced_when_the_run_was_killed_stays_new(tmp_path):
    (tmp_path / ".out.replaced-abc" / "output" / "old").mkdir(parents=True)
    (tmp_path / "out" / "new").mkdir(parents=True)
    with pytest.raises(OutputError, match="exists"), stage(tmp_path / "out", overwrite=False, need_bytes=0):
        pytest.fail("was entered")  # pragma: no cover
    assert entries(tmp_path) == ["out", "out/new"]


@contextmanager
def another_run(out):
    """Another process that stages for the same output until it is killed."""
    code = (
        "import sys; from pathlib import Path; from quantkit.staging import stage\n"
        f"with stage(Path({str(out)!r}), overwrite=True, need_bytes=0):\n"
        "    print('staged', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"staged\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def test_two_runs_to_one_output_are_refused_until_the_first_is_gone(tmp_path):
    out = tmp_path / "out"
    with another_run(out) as child:
        before = entries(tmp_path)
        # The other run may be between its two renames: what it has put aside must stay there.
        (tmp_path / ".out.replaced-abc" / "output").mkdir(parents=True)
        with (
            pytest.raises(OutputError, match="another run is writing it; wait for it or end it"),
            stage(out, overwrite=True, need_bytes=0),
        ):
            pytest.fail("was entered")  # pragma: no cover
        assert entries(tmp_path) == sorted([*before, ".out.replaced-abc", ".out.replaced-abc/output"])
        (tmp_path / ".out.replaced-abc" / "output").rmdir()
        child.send_signal(signal.SIGKILL)
        child.wait()
        with stage(out, overwrite=False, need_bytes=0) as staging:
            staging.publish(overwrite=False)
    assert entries(tmp_path) == ["out"]


def test_too_little_space_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(OutputError, match=r"needs 1000000000\.00 GB of free space, has .* free some"), stage(
        tmp_path / "a" / "out", overwrite=False, need_bytes=10**18
    ):  # fmt: skip
        pytest.fail("was entered")  # pragma: no cover
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG], ids=errno.errorcode.get
)
def test_a_write_that_fails_is_an_output_error_and_leaves_nothing(tmp_path, code):
    with pytest.raises(OutputError, match=f"out: cannot be written: {os.strerror(code)}"):
        fill_and_fail(tmp_path / "out", OSError(code, os.strerror(code)))
    assert entries(tmp_path) == []


def test_an_error_that_is_not_the_outputs_passes_through(tmp_path):
    with pytest.raises(FileNotFoundError), stage(tmp_path / "out", overwrite=False, need_bytes=0):
        (tmp_path / "source").read_text()
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("file/out", "is no usable path"),
        ("file/deeper/out", "is no usable path"),
        ("n" * 300, "is no usable path: File name too long"),
        ("n" * 300 + "/out", "is no usable path: File name too long"),
        ("loop/out", "is no usable path"),
        ("/proc/out", "(is no usable path|cannot be written)"),
        ("/proc/deeper/out", "(is no usable path|cannot be written)"),
    ],
)
def test_a_path_at_which_nothing_can_be_written_is_refused(tmp_path, path, reason):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(os.listdir(tmp_path))  # noqa: PTH208 - a loop of links cannot be walked
    with pytest.raises(OutputError, match=reason), stage(tmp_path / Path(path), overwrite=False, need_bytes=0):
        pytest.fail("was entered")  # pragma: no cover
    assert sorted(os.listdir(tmp_path)) == before  # noqa: PTH208 - as above


def test_a_folder_without_write_permission_is_refused(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o555)
    try:
        with (
            pytest.raises(OutputError, match="cannot be written: Permission denied"),
            stage(tmp_path / "out", overwrite=False, need_bytes=0),
        ):
            pytest.fail("was entered")  # pragma: no cover
    finally:
        tmp_path.chmod(0o755)


def test_published_files_were_synced_before_the_rename(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), real(descriptor))
    )
    with stage(tmp_path / "out", overwrite=False, need_bytes=0) as staging:
        fill(staging)
        inodes = [path.stat().st_ino for path in (staging.content, *staging.content.rglob("*"))]
        staging.publish(overwrite=False)
    assert set(inodes) <= set(synced)
    assert synced[-1] == tmp_path.stat().st_ino


def test_overwrite_replaces_only_folders_that_hold_the_marker(tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.txt").write_text("precious")
    with (
        pytest.raises(OutputError, match=r"thesis: holds no model_index\.json, so it is not replaced"),
        stage(out, overwrite=True, need_bytes=0, marker="model_index.json"),
    ):
        pytest.fail("was entered")  # pragma: no cover
    assert (out / "chapter1.txt").read_text() == "precious"
    (out / "model_index.json").write_text("{}")
    with stage(out, overwrite=True, need_bytes=0, marker="model_index.json") as staging:
        fill(staging)
        staging.publish(overwrite=True)
    assert not (out / "chapter1.txt").exists()


def test_what_is_kept_for_the_next_run_outlives_a_failure_and_goes_with_success(tmp_path):
    def run(error=None):
        with stage(tmp_path / "out", overwrite=False, need_bytes=0) as staging:
            staging.kept.mkdir(exist_ok=True)
            (staging.kept / "block").write_text("tuned")
            if error is not None:
                raise error
            staging.publish(overwrite=False)

    with pytest.raises(ZeroDivisionError):
        run(ZeroDivisionError())
    assert entries(tmp_path) == [".out.resume", ".out.resume/block"]
    run()
    assert entries(tmp_path) == ["out"]
