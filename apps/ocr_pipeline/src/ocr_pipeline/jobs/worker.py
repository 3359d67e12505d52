"""A worker: takes photos one by one, reads them, and is replaced by a fresh process from time to time.

It runs at a lower priority than the API. A photo that takes too long ends the process, not the service:
the photo's
attempt is written down first, systemd starts the next worker.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from ocr_pipeline.errors import BackendError, GpuHangError, ImageRefusedError, OcrError, RecordsError
from ocr_pipeline.gpu import GpuBusyError
from ocr_pipeline.jobs.dispatch import Dispatch
from ocr_pipeline.jobs.reader import Read, Reader
from ocr_pipeline.jobs.store import Claimed, JobStore
from ocr_pipeline.jobs.tables import Kind
from ocr_pipeline.smb.share import Share, ShareError, ShareSettings

log = logging.getLogger(__name__)

EXIT_RECYCLE = 0
EXIT_OVERRAN = 75
ENDING_S = 10.0  # to look whether a server still answers, and to write down what became of a photo
BUSY_DELAY_S = 1.0  # a GPU that others have may be free at any moment
SINGLE = (Kind.READ, Kind.TEXT)
Keep = Callable[[Claimed, str, Read], None]


@dataclass(frozen=True)
class WorkerSettings:
    """Bounds of one worker process."""

    image_timeout_s: float = 60.0
    heartbeat_s: float = 10.0
    sweep_s: float = 5.0
    idle_wait_s: float = 1.0
    recycle_images: int = 200
    recycle_rss_mib: int = 800
    retry_delay_s: float = 5.0
    hang_delay_s: float = 30.0
    max_image_bytes: int = 32 * 1024 * 1024
    nice: int = 10
    noting_s: float = ENDING_S
    # How long a photo of a job waits for backends, records and shares that are away.
    patience_s: float = 6 * 3600.0

    @property
    def reading_s(self) -> float:
        """What the stages may take together: less than a photo, so that a hang is told before the process
        ends."""
        return self.image_timeout_s - min(ENDING_S, self.image_timeout_s / 4)


def rss_mib() -> float:
    """Memory of this process now."""
    with open("/proc/self/statm", encoding="ascii") as handle:  # noqa: PTH123 - no file of a disk
        return int(handle.read().split()[1]) * resource.getpagesize() / 1024 / 1024


def worker_name() -> str:
    """A name that no other process ever had."""
    return f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(4)}"


class Worker:
    """One process' work. `keep` writes a reading to the records; it may be called twice for one photo."""

    def __init__(
        self,
        store: JobStore,
        reader: Reader,
        dispatch: Dispatch,
        settings: WorkerSettings,
        *,
        shares: Mapping[str, ShareSettings] | None = None,
        keep: Keep | None = None,
        exit_process: Callable[[int], Any] = os._exit,
    ) -> None:
        self.name = worker_name()
        self._store = store
        self._reader = reader
        self._dispatch = dispatch
        self._settings = settings
        self._shares = shares or {}
        self._keep = keep
        self._exit = exit_process
        self._stop = threading.Event()
        self._open: dict[str, Share] = {}
        self._gone: dict[str, tuple[float, ShareError]] = {}  # share: until when it is not tried, and why
        self._problem = ""
        self._problem_until = 0.0
        self._away = ""
        self.images = 0

    def stop(self) -> None:
        """Finish the photo in work, then end."""
        self._stop.set()

    def run(self) -> int:
        """Work until told to stop, or until it is time for a fresh process."""
        self._report()
        sweeper = threading.Thread(target=self._sweep_on, name="sweep", daemon=True)
        sweeper.start()
        try:
            while not self._stop.is_set() and not self._worn_out():
                if not self.work_once():
                    self._dispatch.wait(self._settings.idle_wait_s)
        finally:
            self._stop.set()
            for share in self._open.values():
                share.close()
            sweeper.join(timeout=10)
            self._store.dismiss_worker(self.name)
        return EXIT_RECYCLE

    def _worn_out(self) -> bool:
        if self.images >= self._settings.recycle_images:
            log.info("%d photos read: a fresh worker takes over", self.images)
            return True
        if self.images and rss_mib() > self._settings.recycle_rss_mib:
            log.info("%.0f MiB in memory after %d photos: a fresh worker takes over", rss_mib(), self.images)
            return True
        return False

    def work_once(self) -> bool:
        """Take one photo and bring it to an end. False: none waits."""
        claimed = self._store.claim(self.name, single=self._in_trouble())
        if claimed is None:
            return False
        with _Guard(self, claimed):
            self._process(claimed)
        return True

    def _in_trouble(self) -> bool:
        """Photos of jobs then wait; who waits for an answer is told at once, as their photo is tried."""
        return bool(self._away) or time.monotonic() < self._problem_until

    def _process(self, claimed: Claimed) -> None:
        settings = self._settings
        try:
            data = self._bytes_of(claimed)
            self.images += 1
            text_only = claimed.kind is Kind.TEXT
            read = self._reader.read(data, pole_id=claimed.pole_id or None, text_only=text_only)
            digest = hashlib.sha256(data).hexdigest()
            if claimed.kind in (Kind.ALT, Kind.TRA):
                self._to_records(claimed, digest, read)
            self._problem, self._problem_until = "", 0.0
            self._store.complete(claimed, self.name, _stored(claimed, read, digest))
        except ImageRefusedError as error:
            self._fail(claimed, error.reason, str(error), error.http_status)
        except ShareError as error:
            if error.temporary:
                self._put_off(claimed, error.code, str(error), settings.retry_delay_s)
            else:
                self._fail(claimed, error.code, str(error), 400)
        except GpuHangError as error:
            self._trouble(claimed, error, settings.hang_delay_s)
        except GpuBusyError as error:
            self.images -= 1
            self._wait_or_end(claimed, error, BUSY_DELAY_S)
        except BackendError as error:
            self._trouble(claimed, error, settings.retry_delay_s)
        except OcrError as error:
            self._put_back(claimed, error.reason, str(error), error.http_status, settings.retry_delay_s)
        except MemoryError:
            self._fail(claimed, "IMAGE_TOO_LARGE", "the photo does not fit into memory", 413)
        except Exception as error:  # the worker goes on with the next photo, whatever it was
            log.exception("photo %d of job %s", claimed.item_id, claimed.job_id)
            told = f"{type(error).__name__} while it was read; the log of the worker says more"
            self._put_back(claimed, "INTERNAL", told, 500, settings.retry_delay_s)

    def _fail(self, claimed: Claimed, code: str, message: str, status: int) -> None:
        self._store.fail(claimed, self.name, code, message, status=status)

    def _put_back(self, claimed: Claimed, code: str, message: str, status: int, delay_s: float) -> None:
        self._store.put_back(claimed, self.name, code, message, status=status, delay_s=delay_s)

    def _to_records(self, claimed: Claimed, digest: str, read: Read) -> None:
        if self._keep is None:
            return
        try:
            self._keep(claimed, digest, read)
        except (OperationalError, InterfaceError, PoolTimeoutError) as error:
            log.error("the records do not answer: %s", str(error).splitlines()[0])
            raise RecordsError("the records database does not answer") from None

    def _trouble(self, claimed: Claimed, error: BackendError, delay_s: float) -> None:
        """The box has it, not the photo: back into the queue, and everybody is told.

        A hang after which everything answers may be the photo's doing, and nobody waits long for a single
        photo: these are attempts.
        """
        self.images -= 1  # it cost nothing that a fresh process would mend
        self._problem = f"{error.reason}: {error}"
        self._problem_until = time.monotonic() + max(delay_s, self._settings.sweep_s)
        log.warning("photo %d of job %s goes back to the queue: %s", claimed.item_id, claimed.job_id, error)
        its_own = False
        if claimed.kind not in SINGLE and isinstance(error, GpuHangError):
            self._away = self._reader.check()
            its_own = not self._away
        self._wait_or_end(claimed, error, delay_s, its_own=its_own)
        self._report()

    def _wait_or_end(
        self, claimed: Claimed, error: BackendError, delay_s: float, *, its_own: bool = False
    ) -> None:
        """Try a photo again later, with an end: a single one, or one whose own trouble it is, by attempts,
        the others by time. Without an end a GPU that others keep would fill the queue for good."""
        if its_own or claimed.kind in SINGLE:
            self._put_back(claimed, error.reason, str(error), error.http_status, delay_s)
            return
        self._put_off(claimed, error.reason, str(error), delay_s)

    def _put_off(self, claimed: Claimed, code: str, message: str, delay_s: float) -> None:
        patience = self._settings.patience_s
        self._store.put_off(claimed, self.name, code, message, delay_s=delay_s, patience_s=patience)

    def _bytes_of(self, claimed: Claimed) -> bytes:
        if claimed.kind is not Kind.TRA:
            data = self._store.photo(claimed.image_hash)
            if data is None:
                raise ImageRefusedError("IMAGE_LOST", "its bytes are no longer there; send it again")
            return data
        if claimed.share not in self._shares:
            raise ImageRefusedError(
                "SMB_UNKNOWN_SHARE", f"share {claimed.share!r} is no longer set up on this box"
            )
        until, gone = self._gone.get(claimed.share, (0.0, None))
        if gone and time.monotonic() < until:
            raise type(gone)(str(gone))  # one photo finds it out: other jobs do not wait for all of them
        share = self._open.setdefault(claimed.share, Share(self._shares[claimed.share]))
        try:
            return share.read(claimed.name, self._settings.max_image_bytes)
        except ShareError as error:
            if error.temporary:
                self._gone[claimed.share] = (time.monotonic() + self._settings.retry_delay_s, error)
            raise

    def _sweep_on(self) -> None:
        """Beside the work: give back what dead workers held, retire old jobs, say that this one lives."""
        passes = 0
        while not self._stop.wait(self._settings.sweep_s if passes else 0):
            try:
                self._report()
                if self._store.sweep():
                    self._dispatch.wake(1)
                if passes % 60 == 0:
                    self._store.retire()
            except Exception:
                log.exception("sweep")
            passes += 1

    def _report(self) -> None:
        lately = self._problem if time.monotonic() < self._problem_until else ""
        self._away = self._reader.check()
        problem = lately or self._away
        self._store.report_worker(self.name, ready=not problem, problem=problem, model=self._reader.model)

    def overran(self, claimed: Claimed) -> None:
        """The photo takes too long, and code in C cannot be told to stop: this process ends."""
        limit = self._settings.image_timeout_s
        log.error(
            "photo %d of job %s took more than %.0f s: this worker ends",
            claimed.item_id,
            claimed.job_id,
            limit,
        )
        # Beside this thread: a database that is locked or away must not keep the process.
        noting = threading.Thread(target=self._note_overrun, args=(claimed,), name="overran", daemon=True)
        try:
            noting.start()
            noting.join(timeout=self._settings.noting_s)
        finally:
            self._exit(EXIT_OVERRAN)

    def _note_overrun(self, claimed: Claimed) -> None:
        told = f"took more than {self._settings.image_timeout_s:.0f} s"
        try:
            self._put_back(claimed, "IMAGE_TIMEOUT", told, 504, 0.0)
        except Exception:  # its lease runs out all the same
            log.exception("photo %d of job %s", claimed.item_id, claimed.job_id)

    def renew(self, claimed: Claimed) -> bool:
        """Keep the lease."""
        return self._store.heartbeat(claimed, self.name)

    @property
    def settings(self) -> WorkerSettings:
        """The bounds."""
        return self._settings


class _Guard:
    """Beside one photo: renews its lease, and ends the process when it takes too long."""

    def __init__(self, worker: Worker, claimed: Claimed) -> None:
        self._worker = worker
        self._claimed = claimed
        self._done = threading.Event()
        # Two, so that a database that does not answer to the one does not keep the other from its watch.
        self._threads = [
            threading.Thread(target=work, name="guard", daemon=True) for work in (self._watch, self._renew)
        ]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(timeout=30)

    def _watch(self) -> None:
        if not self._done.wait(self._worker.settings.image_timeout_s):
            self._worker.overran(self._claimed)

    def _renew(self) -> None:
        while not self._done.wait(self._worker.settings.heartbeat_s):
            try:
                self._worker.renew(self._claimed)
            except Exception:
                log.exception("the lease of photo %d", self._claimed.item_id)


def _stored(claimed: Claimed, read: Read, digest: str) -> str:
    """What the job tables keep of a reading."""
    if claimed.kind is Kind.TEXT:
        kept: dict[str, Any] = {"text": read.text, "lines": read.lines}
    else:
        kept = {"reading": read.result}
    return json.dumps({**kept, "image_sha256": digest}, ensure_ascii=False)
