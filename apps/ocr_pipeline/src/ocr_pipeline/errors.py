"""Errors of the pipeline, one line each for the person, and the HTTP status that each means to a client."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2


class OcrError(Exception):
    """What stops a reading. `reason` is for machines; the message is one line and carries no secret."""

    exit_code = EXIT_FAILED
    http_status = 500
    reason = "INTERNAL"
    retry_after_s: float | None = None


class SettingsError(OcrError):
    """The settings, a template or a weights file cannot be used; the line names the file and the key."""

    exit_code = EXIT_USAGE
    reason = "BAD_SETTINGS"


class ImageRefusedError(OcrError):
    """The file is no photo that this service reads: damaged, hostile, of a format or size that is refused."""

    exit_code = EXIT_USAGE
    http_status = 400

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ImageTooLargeError(ImageRefusedError):
    """More bytes or pixels than the limits allow."""

    http_status = 413


class BackendError(OcrError):
    """A model server does not answer, or not in its protocol. The same photo may be tried again."""

    http_status = 503
    reason = "BACKEND_UNAVAILABLE"
    retry_after_s = 10.0


class RecordsError(BackendError):
    """The records database does not answer; what was read is read again later."""

    reason = "RECORDS_UNAVAILABLE"


class GpuHangError(BackendError):
    """A stage ran past its deadline and the server behind it does not answer at all any more."""

    reason = "GPU_HANG"
    retry_after_s = 60.0


class DeadlineError(OcrError):
    """The photo took longer than it may; what it would have given is thrown away."""

    http_status = 504
    reason = "DEADLINE_EXCEEDED"
