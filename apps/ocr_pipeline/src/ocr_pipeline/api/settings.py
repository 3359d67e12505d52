"""`service.json`: what the role ocr_service renders. The defaults stand here, and only here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ocr_pipeline.api.bodies import MULTIPLE
from ocr_pipeline.errors import SettingsError
from ocr_pipeline.jobs.store import Limits
from ocr_pipeline.jobs.worker import WorkerSettings
from ocr_pipeline.smb.share import ShareSettings

SETTINGS_FILE = Path("/etc/ocr/service.json")
REMEDY = "mend it in the inventory and run the playbook ocr_server.yml"

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Bytes = Annotated[int, Field(ge=1024, le=2**31)]
Seconds = Annotated[float, Field(gt=0, le=86400 * 366)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class ShareEntry(BaseModel):
    """One share that TRA jobs may name. Clients name it, they never say an address or a password."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    server: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.:-]{0,252}$")]
    share: Annotated[str, Field(pattern=r"^[^\\/:*?\"<>|\x00-\x1f]{1,80}$")]
    username: Annotated[str, Field(min_length=1, max_length=104)]
    password: Annotated[str, Field(min_length=1, max_length=256, repr=False)]
    folder: Annotated[str, Field(max_length=512)] = ""
    domain: Annotated[str, Field(max_length=255)] = ""
    port: Annotated[int, Field(ge=1, le=65535)] = 445
    timeout_s: Annotated[float, Field(gt=0, le=120)] = 10.0

    def settings(self) -> ShareSettings:
        """For the code that reads it."""
        return ShareSettings(**self.model_dump())


class SharesFile(BaseModel):
    """The whole of shares.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    version: Literal[1] = 1
    shares: dict[Name, ShareEntry] = {}


class Settings(BaseModel):
    """The settings of API and worker. Times in seconds, sizes in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8091
    state_dir: str = "/var/lib/ocr"
    database: str = Field(default="", repr=False)
    records: str = Field(default="", repr=False)
    queue: str = Field(default="", repr=False)
    keys_file: str = ""
    shares_file: str = ""
    pipeline_file: str = ""

    max_body: Bytes = 32 * 1024 * 1024
    max_job_body: Bytes = 200 * 1000 * 1000
    max_buffered: Bytes = 640 * 1000 * 1000  # memory: bodies count MULTIPLE times their size
    max_image: Bytes = 25_000_000
    body_timeout: Seconds = 60
    answer_timeout: Seconds = 120
    max_poles: Count = 50
    max_images_per_pole: Count = 30
    max_feeder_images: Count = 20_000
    queue_limit: Count = 64
    job_limit: Count = 32
    attempts: Annotated[int, Field(ge=1, le=20)] = 3
    lease: Seconds = 60
    retention: Seconds = 7 * 86400
    records_retention: Annotated[float, Field(gt=0, le=86400 * 3660)] = 30 * 86400
    image_timeout: Seconds = 60
    recycle_images: Count = 200
    recycle_memory_mib: Annotated[int, Field(ge=100, le=1_000_000)] = 800
    worker_nice: Annotated[int, Field(ge=0, le=19)] = 10
    retry_delay: Seconds = 5
    hang_delay: Seconds = 30

    @field_validator("database", "records", "queue")
    @classmethod
    def _address(cls, address: str) -> str:
        if address and "://" not in address:
            raise ValueError("must be an address like sqlite:////var/lib/ocr/jobs.sqlite3")
        return address

    @model_validator(mode="after")
    def _room(self) -> Settings:
        largest = max(self.max_body, self.max_job_body) * MULTIPLE
        if self.max_buffered < largest:
            raise ValueError(f"max_buffered must be at least {largest}: {MULTIPLE} times the largest body")
        return self

    def url(self, kind: Literal["database", "records", "queue"]) -> str:
        """An address; without one a SQLite file in the state folder."""
        file = {"database": "jobs", "records": "records", "queue": "queue"}[kind]
        given: str = getattr(self, kind)
        return given or f"sqlite:///{self.state_dir}/{file}.sqlite3"

    def records_kept(self) -> float:
        """How long readings stand in the records: at least as long as the job that they are of."""
        return max(self.records_retention, self.retention)

    def limits(self) -> Limits:
        """For the job tables."""
        return Limits(
            queue=self.queue_limit,
            jobs=self.job_limit,
            attempts=self.attempts,
            lease_s=self.lease,
            retention_s=self.retention,
        )

    def worker(self) -> WorkerSettings:
        """For a worker."""
        return WorkerSettings(
            image_timeout_s=self.image_timeout,
            heartbeat_s=min(10.0, self.lease / 4),
            recycle_images=self.recycle_images,
            recycle_rss_mib=self.recycle_memory_mib,
            retry_delay_s=self.retry_delay,
            hang_delay_s=self.hang_delay,
            max_image_bytes=self.max_image,
            nice=self.worker_nice,
        )

    def shares(self) -> dict[str, ShareSettings]:
        """The shares of shares_file. Raises SettingsError, without a word of what stands there."""
        if not self.shares_file:
            return {}
        found = _read(Path(self.shares_file), SharesFile)
        return {name: entry.settings() for name, entry in found.shares.items()}


def load(path: Path = SETTINGS_FILE) -> Settings:
    """Read and check service.json. Raises SettingsError in one line with the remedy."""
    found: Settings = _read(path, Settings)
    return found


def _read(path: Path, model: type[Any]) -> Any:
    try:
        return model.model_validate(json.loads(path.read_bytes()))
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror}); {REMEDY}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        words = first["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{path}: {where}: {words}; {REMEDY}") from None
    except (ValueError, RecursionError):
        raise SettingsError(f"{path} is not usable JSON; {REMEDY}") from None
