"""Runs the video jobs of a store, one at a time for each model."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Literal

from quantkit_runtime.server.deployment import Deployment
from quantkit_runtime.server.errors import NO_RETRY, ApiError
from quantkit_runtime.server.job_store import Job, JobStore
from quantkit_runtime.server.media import decode_image, encode_image, encode_mp4
from quantkit_runtime.server.protocol import Finished, Frames, Progress, VideoRequest
from quantkit_runtime.server.settings import Limits

log = logging.getLogger(__name__)

_CLIENT = "jobs"  # of the scheduler: jobs and requests take turns
_SWEEP_S = 60.0
_RETRY_S = 10.0


class Jobs:
    """Video jobs.

    Args:
        store: Where they are kept.
        deployments: Models that may run them.
        limits: On their number, time and size.
    """

    def __init__(self, store: JobStore, deployments: Sequence[Deployment], limits: Limits) -> None:
        self._store = store
        self._limits = limits
        self._arrived = {deployment.name: asyncio.Event() for deployment in deployments}
        self._progress: dict[str, int] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        rounds: list[Callable[[], Awaitable[None]]] = [
            *(partial(self._work, deployment) for deployment in deployments),
            self._sweep,
        ]
        self._workers = [asyncio.create_task(_for_ever(work)) for work in rounds]

    async def warn_of_others(self) -> None:
        """Log which jobs no served model runs: they wait until the server is started with their model again."""
        by_model, _ = await asyncio.to_thread(self._store.usage)
        for model in by_model.keys() - self._arrived.keys():
            log.warning(
                "video jobs wait for a model that is not served", extra={"model": model, "jobs": by_model[model]}
            )

    async def stop(self) -> None:
        """Run no more jobs; what runs is queued again for the next start."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    async def close(self) -> None:
        """Stop, and close the store."""
        await self.stop()
        await asyncio.to_thread(self._store.close)

    async def create(
        self, owner: str, model: str, asked: VideoRequest, *, body_hash: str, idempotency_key: str | None
    ) -> Job:
        """Return a new job, or the one that the same key made before.

        Raises:
            ApiError: Too many jobs wait, their files take too much, the key was used for something else, or the
                store fails, as on a full disk.
        """
        picture = None
        if asked.image is not None:
            picture = await asyncio.to_thread(encode_image, asked.image)
        fields = {name: value for name, value in vars(asked).items() if name not in ("id", "image")}
        keys: dict[str, Any] = {"body_hash": body_hash, "idempotency_key": idempotency_key}
        try:
            if idempotency_key is not None:
                made = await asyncio.to_thread(self._store.made_by, owner, idempotency_key)
                if made is not None:
                    return _of_same_request(made, body_hash)
            await self._check_room()
            job, is_new = await asyncio.to_thread(self._store.create, owner, model, fields, picture, **keys)
        except (OSError, sqlite3.Error) as error:
            log.error("a video job cannot be kept", exc_info=error)
            raise ApiError(
                507, "the job cannot be kept; the server's disk may be full", code="storage_full", headers=NO_RETRY
            ) from error
        if is_new:
            self._arrived[model].set()
        return _of_same_request(job, body_hash)

    async def _check_room(self) -> None:
        by_model, size = await asyncio.to_thread(self._store.usage)
        waiting = sum(by_model.get(model, 0) for model in self._arrived)
        if waiting >= self._limits.max_jobs:
            raise ApiError(
                429, f"{waiting} jobs wait; at most {self._limits.max_jobs}", code="queue_full",
                headers={"Retry-After": "60"},
            )  # fmt: skip
        if size >= self._limits.job_quota_bytes:
            raise ApiError(
                429, f"kept videos take {size} bytes of {self._limits.job_quota_bytes}; delete some first",
                code="storage_full",
            )  # fmt: skip

    async def get(self, identity: str, owner: str) -> Job:
        """Return a job.

        Raises:
            ApiError: There is none of this id and owner.
        """
        job = await asyncio.to_thread(self._store.get, identity, owner)
        if job is None:
            raise ApiError(404, "id: no such video; it may have expired", param="id", code="video_not_found")
        return job

    async def list_of(
        self, owner: str, limit: int, after: str | None, order: Literal["asc", "desc"]
    ) -> tuple[list[Job], bool]:
        """Return jobs behind another one, and whether there are more."""
        return await asyncio.to_thread(self._store.list_of, owner, limit, after, order)

    async def delete(self, identity: str, owner: str) -> None:
        """Delete a job; a running one stops at its next step.

        Raises:
            ApiError: There is none of this id and owner.
        """
        if not await asyncio.to_thread(self._store.delete, identity, owner):
            raise ApiError(404, "id: no such video", param="id", code="video_not_found")
        if (running := self._running.get(identity)) is not None:
            running.cancel()

    async def content(self, job: Job) -> bytes:
        """Return the video of a job.

        Raises:
            ApiError: It is not completed.
        """
        if job.status != "completed":
            raise ApiError(409, f"id: this video is {job.status}", param="id", code="video_not_completed")
        try:
            return await asyncio.to_thread(self._store.video_file(job.id).read_bytes)
        except FileNotFoundError:
            raise ApiError(404, "id: no such video", param="id", code="video_not_found") from None

    def progress(self, job: Job) -> int:
        """Return percent of the steps."""
        return 100 if job.status == "completed" else self._progress.get(job.id, 0)

    async def _work(self, deployment: Deployment) -> None:
        """Run the next job, or wait for one."""
        if deployment.engine.state == "failed":  # jobs wait for the next start of the server
            await asyncio.sleep(_RETRY_S)
            return
        arrived = self._arrived[deployment.name]
        arrived.clear()
        job = await asyncio.to_thread(self._store.start_next, deployment.name)
        if job is None:
            await arrived.wait()
            return
        task = self._running[job.id] = asyncio.create_task(self._run(job, deployment))
        try:
            await asyncio.wait({task})
            if not task.cancelled():
                task.result()
        except BaseException:  # the server stops, or what became of the job could not be written
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            try:
                await asyncio.to_thread(self._store.requeue, job.id)
            except Exception as error:  # it stays in progress, and is the next one that is started
                log.error("job could not be put back", exc_info=error, extra={"job": job.id})
            raise
        finally:
            del self._running[job.id]
            self._progress.pop(job.id, None)

    async def _run(self, job: Job, deployment: Deployment) -> None:
        try:
            asked = await asyncio.to_thread(self._request, job)
            ticket = deployment.scheduler.submit(asked, _CLIENT, timeout_s=None, bounded=False)
            async for event in deployment.scheduler.follow(ticket):
                if isinstance(event, Progress):
                    self._progress[job.id] = 99 * event.step // event.steps
                elif isinstance(event, Finished):
                    assert isinstance(event.result, Frames)
                    video = await asyncio.to_thread(encode_mp4, event.result.pixels, asked.fps)
                    await asyncio.to_thread(self._store.complete, job.id, video)
        except ApiError as error:
            if deployment.engine.state == "failed":
                await asyncio.to_thread(self._store.requeue, job.id)
                return
            await asyncio.to_thread(self._store.fail, job.id, error.code or "failed", error.message)
        except Exception as error:
            log.error("job failed", exc_info=error, extra={"job": job.id})
            await asyncio.to_thread(self._store.fail, job.id, "internal_error", "the server failed on it")

    def _request(self, job: Job) -> VideoRequest:
        fields: dict[str, Any] = dict(job.request)
        picture = self._store.picture_file(job.id)
        if picture.is_file():
            fields["image"] = decode_image(picture.read_bytes(), _UNLIMITED, "input_reference")
        return VideoRequest(id=f"{job.id}.{job.tries}", **fields)

    async def _sweep(self) -> None:
        await asyncio.to_thread(self._store.expire)
        await asyncio.sleep(_SWEEP_S)


async def _for_ever(work: Callable[[], Awaitable[None]]) -> None:
    """Do something again and again; a store that fails, as on a full disk, may work later."""
    while True:
        try:
            await work()
        except Exception as error:
            log.error("video jobs wait: the store fails", exc_info=error)
            await asyncio.sleep(_RETRY_S)


def _of_same_request(job: Job, body_hash: str) -> Job:
    if job.body_hash != body_hash:
        raise ApiError(
            409, "Idempotency-Key: was used for another request", param="Idempotency-Key",
            code="idempotency_key_reused",
        )  # fmt: skip
    return job


_UNLIMITED = Limits(max_upload_bytes=2**40, max_upload_pixels=2**40)  # it was checked when it came
