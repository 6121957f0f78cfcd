"""Video jobs on disk: a SQLite database and a file for each picture that came and each video that went out.

All methods block; callers run them in a thread. File names are made from ids that are made here.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantkit_runtime.server.settings import SettingsError

Status = Literal["queued", "in_progress", "completed", "failed"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY,
    number INTEGER NOT NULL,
    owner TEXT NOT NULL,
    model TEXT NOT NULL,
    status TEXT NOT NULL,
    request TEXT NOT NULL,
    created_at REAL NOT NULL,
    completed_at REAL,
    expires_at REAL,
    tries INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0,
    error_code TEXT,
    error_message TEXT,
    idempotency_key TEXT,
    body_hash TEXT NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS by_key ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX IF NOT EXISTS by_status ON jobs (status, number);
"""
_BY_ID = "SELECT * FROM jobs WHERE id = ? AND owner = ? AND (expires_at IS NULL OR expires_at > ?)"
_LISTS = {
    "asc": "SELECT * FROM jobs WHERE owner = ? AND (expires_at IS NULL OR expires_at > ?) "
    "AND (? IS NULL OR number > (SELECT number FROM jobs WHERE id = ?)) ORDER BY number ASC LIMIT ?",
    "desc": "SELECT * FROM jobs WHERE owner = ? AND (expires_at IS NULL OR expires_at > ?) "
    "AND (? IS NULL OR number < (SELECT number FROM jobs WHERE id = ?)) ORDER BY number DESC LIMIT ?",
}
_BY_KEY = "SELECT * FROM jobs WHERE owner = ? AND idempotency_key = ?"
_VERSION = 1
_MAX_TRIES = 3


@dataclass(frozen=True)
class Job:
    """A row.

    Attributes:
        id: As callers know it.
        number: Counts all jobs of the store, in the order of their creation.
        owner: Whose it is; others do not see it.
        model: Name of the model.
        status: Where it stands.
        request: Fields of the `VideoRequest`, the picture aside.
        created_at: Seconds since 1970, as the other times.
        completed_at: When it ended, well or not.
        expires_at: When it is deleted.
        tries: Times it was started.
        bytes: Of its files.
        error_code: Short name of why it failed.
        error_message: Why it failed.
        idempotency_key: As the caller gave it.
        body_hash: Of what the caller sent.
    """

    id: str
    number: int
    owner: str
    model: str
    status: Status
    request: dict[str, Any]
    created_at: float
    completed_at: float | None
    expires_at: float | None
    tries: int
    bytes: int
    error_code: str | None
    error_message: str | None
    idempotency_key: str | None
    body_hash: str


class JobStore:
    """Jobs of one server; a second server cannot open the same folder.

    Args:
        folder: Made if it is missing, readable by its owner alone.
        ttl_s: Time that a job is kept after its end.

    Raises:
        SettingsError: The folder cannot be used.
    """

    def __init__(self, folder: Path, ttl_s: float) -> None:
        self._folder = folder
        self._ttl_s = ttl_s
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._guard = (folder / "lock").open("w")
        except OSError as error:
            raise SettingsError(f"--state-dir {folder}: cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._guard.close()
            raise SettingsError(f"--state-dir {folder}: another server uses it; give another folder") from None
        try:
            self._database = sqlite3.connect(folder / "jobs.sqlite", check_same_thread=False)
            try:
                self._database.row_factory = sqlite3.Row
                self._open()
            except BaseException:
                self._database.close()
                raise
        except (sqlite3.Error, OSError) as error:
            self._guard.close()
            raise SettingsError(f"{folder / 'jobs.sqlite'}: cannot be opened ({error}); move it away") from error

    def close(self) -> None:
        """Close the database and let another server have the folder."""
        with self._lock:
            self._database.close()
            self._guard.close()

    def create(
        self,
        owner: str,
        model: str,
        request: dict[str, Any],
        picture: bytes | None,
        *,
        body_hash: str,
        idempotency_key: str | None,
    ) -> tuple[Job, bool]:
        """Return a new job, or the one that this key was used for before; and whether it is new.

        Raises:
            OSError: The picture cannot be kept; like the next, it leaves nothing behind.
            sqlite3.Error: The job cannot.
        """
        identity = f"video_{uuid.uuid4().hex}"
        with self._undone_on_error(identity), self._transaction() as database:
            if idempotency_key is not None:
                found = database.execute(_BY_KEY, (owner, idempotency_key)).fetchone()
                if found is not None:
                    return _job(found), False
            if picture is not None:
                _write(self.picture_file(identity), picture)
            database.execute(
                "INSERT INTO jobs (id, number, owner, model, status, request, created_at, bytes, idempotency_key, "
                "body_hash) VALUES (?, (SELECT COALESCE(MAX(number), 0) + 1 FROM jobs), ?, ?, 'queued', ?, ?, ?, "
                "?, ?)",
                (identity, owner, model, json.dumps(request), time.time(), len(picture or b""), idempotency_key,
                 body_hash),
            )  # fmt: skip
            return self._find(identity), True

    def get(self, identity: str, owner: str) -> Job | None:
        """Return a job of this owner's."""
        with self._lock:
            row = self._database.execute(_BY_ID, (identity, owner, time.time())).fetchone()
        return _job(row) if row is not None else None

    def made_by(self, owner: str, idempotency_key: str) -> Job | None:
        """Return the job of this owner's that a key was used for."""
        with self._lock:
            row = self._database.execute(_BY_KEY, (owner, idempotency_key)).fetchone()
        return _job(row) if row is not None else None

    def list_of(
        self, owner: str, limit: int, after: str | None, order: Literal["asc", "desc"]
    ) -> tuple[list[Job], bool]:
        """Return jobs of this owner's behind another one, and whether there are more."""
        with self._lock:
            rows = self._database.execute(_LISTS[order], (owner, time.time(), after, after, limit + 1)).fetchall()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def start_next(self, model: str) -> Job | None:
        """Return the oldest job of a model that has not ended, which is in progress from now on.

        A model's jobs run one at a time: one that is in progress already was stopped, and could not be put back.
        """
        with self._transaction() as database:
            row = database.execute(
                "SELECT id FROM jobs WHERE status IN ('queued', 'in_progress') AND model = ? "
                "ORDER BY number LIMIT 1",
                (model,),
            ).fetchone()
            if row is None:
                return None
            database.execute(
                "UPDATE jobs SET status = 'in_progress', tries = tries + (status = 'queued') WHERE id = ?",
                (row["id"],),
            )
            return self._find(row["id"])

    def requeue(self, identity: str) -> None:
        """Put a job back that was stopped through no fault of its own."""
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET status = 'queued', tries = tries - 1 WHERE id = ? AND status = 'in_progress'",
                (identity,),
            )

    def complete(self, identity: str, video: bytes) -> None:
        """Keep the video of a job, unless it was deleted meanwhile."""
        _write(self.video_file(identity), video)
        now = time.time()
        with self._transaction() as database:
            done = database.execute(
                "UPDATE jobs SET status = 'completed', completed_at = ?, expires_at = ?, bytes = bytes + ? "
                "WHERE id = ?",
                (now, now + self._ttl_s, len(video), identity),
            )
            if done.rowcount == 0:
                self._unlink(identity)

    def fail(self, identity: str, code: str, message: str) -> None:
        """End a job without a video."""
        now = time.time()
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET status = 'failed', completed_at = ?, expires_at = ?, error_code = ?, "
                "error_message = ? WHERE id = ?",
                (now, now + self._ttl_s, code, message, identity),
            )

    def delete(self, identity: str, owner: str) -> bool:
        """Delete a job of this owner's and its files; False if there is none."""
        with self._transaction() as database:
            done = database.execute("DELETE FROM jobs WHERE id = ? AND owner = ?", (identity, owner))
            if done.rowcount:
                self._unlink(identity)
            return bool(done.rowcount)

    def expire(self) -> None:
        """Delete what has expired."""
        with self._transaction() as database:
            rows = database.execute("SELECT id FROM jobs WHERE expires_at <= ?", (time.time(),)).fetchall()
            for row in rows:
                database.execute("DELETE FROM jobs WHERE id = ?", (row["id"],))
                self._unlink(row["id"])

    def usage(self) -> tuple[dict[str, int], int]:
        """Return how many jobs wait for each model, and the bytes of all files."""
        with self._lock:
            rows = self._database.execute(
                "SELECT model, COUNT(*) AS n FROM jobs WHERE status = 'queued' GROUP BY model"
            ).fetchall()
            size = self._database.execute("SELECT COALESCE(SUM(bytes), 0) AS n FROM jobs").fetchone()["n"]
        return {row["model"]: row["n"] for row in rows}, int(size)

    def video_file(self, identity: str) -> Path:
        """Return where the video of a job is."""
        return self._folder / f"{identity}.mp4"

    def picture_file(self, identity: str) -> Path:
        """Return where the picture is that a job starts from."""
        return self._folder / f"{identity}.png"

    def _open(self) -> None:
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")  # a job that was acknowledged survives a power cut
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            raise sqlite3.DatabaseError(f"version {version} is not known here")
        with self._transaction() as database:
            database.executescript(_SCHEMA)
            database.execute(f"PRAGMA user_version = {_VERSION}")
            # What ran when the last server ended runs again, but not for ever: it may be what ended it.
            now = time.time()
            database.execute(
                "UPDATE jobs SET status = 'failed', completed_at = ?, expires_at = ?, "
                "error_code = 'server_stopped', "
                "error_message = 'the server ended ' || tries || ' times while this ran' "
                "WHERE status = 'in_progress' AND tries >= ?",
                (now, now + self._ttl_s, _MAX_TRIES),
            )
            database.execute("UPDATE jobs SET status = 'queued' WHERE status = 'in_progress'")
            known = {row["id"] for row in database.execute("SELECT id FROM jobs")}
        for file in list(self._folder.glob("video_*.*")):  # of jobs that were never acknowledged, or are deleted
            if file.name.partition(".")[0] not in known:
                file.unlink(missing_ok=True)

    def _find(self, identity: str) -> Job:
        return _job(self._database.execute("SELECT * FROM jobs WHERE id = ?", (identity,)).fetchone())

    def _unlink(self, identity: str) -> None:
        self.video_file(identity).unlink(missing_ok=True)
        self.picture_file(identity).unlink(missing_ok=True)

    @contextmanager
    def _undone_on_error(self, identity: str) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._unlink(identity)
            raise

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._database:
            yield self._database


def _job(row: sqlite3.Row) -> Job:
    fields = dict(row)
    fields["request"] = json.loads(fields["request"])
    return Job(**fields)


def _write(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)  # it would fill a full disk
        raise
