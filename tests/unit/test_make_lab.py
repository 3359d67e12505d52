"""`make lab`: what it makes of a model's answer, of a step that fails, and of an inventory it cannot read."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from scripts import make_lab
from scripts._inventory import InventoryUnreadable

Served = tuple[str, dict[str, object]]


def reply(content: object) -> str:
    return json.dumps(
        {"choices": [{"message": {"content": content}}], "timings": {"predicted_per_second": 42.5}}
    )


@pytest.fixture
def server() -> Iterator[Served]:
    """A base URL, and what is answered there (`delay` in seconds); `asked` becomes the request."""
    state: dict[str, object] = {"status": 200, "body": reply(" Paris. "), "delay": 0.0}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state["path"] = self.path
            state["asked"] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(float(str(state["delay"])))
            body = str(state["body"]).encode()
            self.send_response(int(str(state["status"])))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}", state
        http.shutdown()


def test_the_model_is_asked_and_its_answer_comes_back(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    url, state = server
    assert make_lab.ask(url, "Where?") == ("Paris.", 42.5)
    assert state["path"] == "/v1/chat/completions"
    assert "Where?" in str(state["asked"])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"body": reply("")}, "was empty"),
        ({"body": reply(" \n")}, "was empty"),
        ({"body": reply(None)}, "was empty"),
        ({"body": "<html>"}, "did not answer as llama-server does"),
        ({"body": "[]"}, "did not answer as llama-server does"),
        ({"body": '{"choices": []}'}, "did not answer as llama-server does"),
        ({"status": 503}, "503 Service Unavailable"),
        ({"delay": 1.0}, "timed out"),
    ],
)
def test_no_answer_is_one_line(server: Served, answer: dict[str, object], said: str) -> None:
    url, state = server
    state.update(answer)
    with pytest.raises(make_lab.NotDone, match=said) as caught:
        make_lab.ask(url, "Where?", timeout=0.3)
    assert "\n" not in str(caught.value)
    assert caught.value.code == 1


def test_a_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(make_lab.NotDone, match=r"no answer from http://127.0.0.1:9: .*refused"):
        make_lab.ask("http://127.0.0.1:9", "Where?")


def test_a_step_that_fails_or_hangs_is_said() -> None:
    assert make_lab.step("Nothing", "true") < 60
    with pytest.raises(make_lab.NotDone, match="'Break' ended with exit code 3") as caught:
        make_lab.step("Break", "sh", "-c", "exit 3")
    assert caught.value.code == 3
    with pytest.raises(make_lab.NotDone, match=r"'Sleep' was not done after 0\.2 s"):
        make_lab.step("Sleep", "sleep", "30", timeout=0.2)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (make_lab.NotDone("the answer was empty"), 1),
        (make_lab.NotDone("a step failed", 2), 2),
        (InventoryUnreadable("no host"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_end_is_one_line_and_a_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(make_lab, "main", fail)
    assert make_lab.run() == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("make lab: ")


def test_the_hints_name_the_lab_that_is_up() -> None:
    assert "LAB_NAME" not in make_lab.hints("lab", "lab-llm", "lmswitch")
    lines = make_lab.hints("other", "lab-llm", "sudo -iu llm lmswitch").splitlines()
    assert [line[16:].partition(" ")[0] for line in lines] == ["LAB_NAME=other"] * len(lines)
    assert lines[1].endswith(" LAB_NAME=other python3 -m lab ssh lab-llm sudo -iu llm lmswitch list")
