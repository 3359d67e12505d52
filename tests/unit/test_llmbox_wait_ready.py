"""The readiness wait against real processes and real sockets."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from llmbox import wait_ready


class Server:
    """Answers every connection with the next of `statuses`; the last one stays."""

    def __init__(self, listener: socket.socket, statuses: list[int]) -> None:
        self.listener, self.statuses, self.asked = listener, statuses, 0
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        """Serve until the listener is closed."""
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(1024)
                status = self.statuses[min(self.asked, len(self.statuses) - 1)]
                self.asked += 1
                connection.sendall(f"HTTP/1.1 {status} Whatever\r\n\r\n".encode())


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives for a while."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A listening TCP socket on the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def address(listener: socket.socket) -> str:
    """The listener as host:port."""
    return f"127.0.0.1:{listener.getsockname()[1]}"


def test_loading_is_waited_for(sleeper: subprocess.Popen[bytes], listener: socket.socket) -> None:
    server = Server(listener, [503, 503, 200])
    assert wait_ready.wait(sleeper.pid, address(listener), 10) is None
    assert server.asked == 3


def test_a_unix_socket_is_waited_for_too(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    path = tmp_path / "llama.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        Server(listener, [200])
        assert wait_ready.wait(sleeper.pid, str(path), 10) is None


def test_a_death_ends_the_wait_at_once(listener: socket.socket) -> None:
    Server(listener, [503])
    with subprocess.Popen(["sleep", "0.5"]) as process:
        began = time.monotonic()
        reason = wait_ready.wait(process.pid, address(listener), 30)
        assert time.monotonic() - began < 3
    assert reason is not None and "ended after" in reason


def test_a_death_is_noticed_even_when_another_server_answers(listener: socket.socket) -> None:
    Server(listener, [200])
    with subprocess.Popen(["true"]) as process:
        time.sleep(0.3)
        reason = wait_ready.wait(process.pid, address(listener), 30)
    assert reason is not None and "ended" in reason


def test_the_deadline_names_what_was_seen(sleeper: subprocess.Popen[bytes], listener: socket.socket) -> None:
    Server(listener, [503])
    reason = wait_ready.wait(sleeper.pid, address(listener), 0.4)
    assert reason is not None and "HTTP 503" in reason and "start_timeout" in reason


def test_a_process_that_never_was(listener: socket.socket) -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    assert "ended before" in (wait_ready.wait(process.pid, address(listener), 1) or "")


@pytest.mark.parametrize(
    ("listen", "reached"),
    [("0.0.0.0:1234", ("127.0.0.1", 1234)), ("[::]:1234", ("::1", 1234)), ("10.0.0.1:80", ("10.0.0.1", 80))],
)
def test_wildcards_are_reached_through_the_loopback(listen: str, reached: tuple[str, int]) -> None:
    assert wait_ready.reachable(listen) == reached


@pytest.mark.parametrize("words", [[], ["--pid", "x", "--listen", "a:1", "--timeout", "1"], ["--pid", "1"]])
def test_bad_usage_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert wait_ready.main(words) == 2
    assert capsys.readouterr().err.startswith("usage: ")


def test_it_imports_nothing_heavy() -> None:
    code = "import sys, llmbox.wait_ready; print(sorted({'httpx', 'pydantic', 'ssl'} & {*sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_signal_is_not_swallowed(sleeper: subprocess.Popen[bytes], listener: socket.socket) -> None:
    command = [sys.executable, "-m", "llmbox.wait_ready", "--listen", address(listener), "--timeout", "60"]
    with subprocess.Popen([*command, "--pid", str(sleeper.pid)], stderr=subprocess.DEVNULL) as waiting:
        time.sleep(0.5)
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(5) == -signal.SIGTERM
