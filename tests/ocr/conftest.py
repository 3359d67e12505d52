"""Fixtures of the tests with real servers and real processes, on loopback."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ocr import servers
from tests.ocr.service import Service, running


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with one worker and the stand-in for the pipeline; embedded, as it comes."""
    with running(tmp_path_factory.mktemp("service"), queue_limit=64) as made:
        yield made


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Redis."""
    with servers.redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A real PostgreSQL."""
    with servers.postgresql() as url:
        yield url


@pytest.fixture
def samba() -> Iterator[servers.Samba]:
    """A real Samba that insists on encryption."""
    with servers.samba() as server:
        yield server
