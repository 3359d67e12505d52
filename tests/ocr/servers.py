"""Real servers for tests, on loopback, of this process alone: Redis, PostgreSQL, Samba. Each in a folder
of its own."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_START_S = 30
_PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


def program(name: str, package: str, *folders: str) -> str:
    """Where a program is; the test is skipped, with the reason, where it is not."""
    found = shutil.which(name, path=":".join([_PATH, *folders]))
    if found is None:
        pytest.skip(f"{name} is not installed on this machine; install: apt-get install {package}")
    return found


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def wait_for(condition: Callable[[], bool], what: str, seconds: float = _START_S) -> None:
    """Until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen within {seconds:.0f} s", pytrace=False)
        time.sleep(0.02)


def accepts(port: int) -> bool:
    """Whether somebody listens."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def running(argv: Sequence[object], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process, ended with everything in its group at the end."""
    with log.open("ab") as handle:
        process = subprocess.Popen(
            [str(part) for part in argv], stdout=handle, stderr=handle, start_new_session=True, **options
        )
    try:
        yield process
    finally:
        for number in (15, 9):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
                break


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[str]:
    """A Redis, and its address."""
    server = program("redis-server", "redis-server")
    port = free_port()
    argv = [server, "--port", port, "--bind", "127.0.0.1", "--dir", folder, "--appendonly", "yes"]
    with running(argv, folder / "redis.log"):
        wait_for(lambda: accepts(port), "Redis' start")
        yield f"redis://127.0.0.1:{port}/0"


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that a server's user may enter: pytest shuts its own when another run of it begins."""
    with tempfile.TemporaryDirectory(prefix="ocr-server-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        yield folder


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """A PostgreSQL with one empty database, and its address."""
    with open_folder() as folder:
        yield from _postgresql(folder)


def _postgresql(folder: Path) -> Iterator[str]:
    newest = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    postgres = program("postgres", "postgresql", *map(str, newest))
    bin_folder = Path(postgres).resolve().parent
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:  # it refuses to run as root
        account = pwd.getpwnam("postgres")
        as_user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        os.chown(folder, account.pw_uid, account.pw_gid)
    data, port = folder / "data", free_port()
    subprocess.run(
        [str(bin_folder / "initdb"), "-D", str(data), "-A", "trust", "-U", user, "-N", "--locale=C.UTF-8"],
        check=True,
        capture_output=True,
        timeout=120,
        cwd="/",
        **as_user,
    )
    argv = [postgres, "-D", data, "-p", port, "-h", "127.0.0.1", "-k", folder, "-F"]
    with running(argv, folder / "postgres.log", cwd="/", **as_user):
        wait_for(lambda: accepts(port), "PostgreSQL's start")
        yield f"postgresql://{user}@127.0.0.1:{port}/postgres"


@dataclass
class Samba:
    """A Samba with one share, `photos`."""

    folder: Path
    port: int
    user: str
    password: str
    log: Path
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def photos(self) -> Path:
        """The share's folder on this machine."""
        return self.folder / "photos"

    def start(self) -> None:
        """Begin to serve, on the same port."""
        smbd = program("smbd", "samba")
        argv = [smbd, "-F", "--no-process-group", "-s", self.folder / "smb.conf", "-p", self.port]
        self._stack.enter_context(running(argv, self.log))
        wait_for(lambda: accepts(self.port), "Samba's start")

    def stop(self) -> None:
        """Be gone at once, connections included."""
        self._stack.close()


@contextlib.contextmanager
def samba(*, encryption: str = "required") -> Iterator[Samba]:
    """A Samba that insists on encryption."""
    with open_folder() as folder:
        yield from _samba(folder, encryption)


def _samba(folder: Path, encryption: str) -> Iterator[Samba]:
    program("smbd", "samba")
    if os.geteuid() != 0:
        pytest.skip("Samba's users are system users, which only root may change to; run it as root")
    password = secrets.token_urlsafe(16)
    user = "games"  # an account that every Debian has, and that owns nothing here
    port = free_port()
    for name in ("private", "lock", "state", "cache", "pid", "ncalrpc", "photos"):
        (folder / name).mkdir()
    (folder / "photos").chmod(0o755)
    (folder / "smb.conf").write_text(
        f"""[global]
server role = standalone server
workgroup = LAB
netbios name = OCRTEST
disable netbios = yes
bind interfaces only = yes
interfaces = lo
map to guest = never
restrict anonymous = 2
server min protocol = SMB3
server smb encrypt = {encryption}
private dir = {folder}/private
lock directory = {folder}/lock
state directory = {folder}/state
cache directory = {folder}/cache
pid directory = {folder}/pid
ncalrpc dir = {folder}/ncalrpc
log file = {folder}/samba.log
load printers = no
printcap name = /dev/null
disable spoolss = yes

[photos]
path = {folder}/photos
read only = yes
valid users = {user}

[others]
path = {folder}/photos
read only = yes
valid users = nobody
"""
    )
    subprocess.run(
        [program("smbpasswd", "samba"), "-c", str(folder / "smb.conf"), "-a", "-s", user],
        input=f"{password}\n{password}\n".encode(),
        check=True,
        capture_output=True,
        timeout=30,
    )
    server = Samba(folder, port, user, password, folder / "smbd.log")
    try:
        server.start()
        yield server
    finally:
        server.stop()
