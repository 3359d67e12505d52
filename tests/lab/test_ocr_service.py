"""The OCR service on its lab host, as the role deployed it: the embedded pipeline, under systemd."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

import pytest

from tests.ocr.service import b64, photo

OCR = "lab-ocr"
OnHost = Callable[..., Any]
URL = "http://127.0.0.1:8091"


@pytest.fixture(scope="module", autouse=True)
def deployed(on_host: OnHost) -> None:
    """A lab whose OCR host has the service and has read its models."""
    on_host(OCR, f"python3 -c {shlex.quote(FETCH)} /ready", timeout=90).check()


FETCH = f"""
import json, sys, time, urllib.request, urllib.error
path, body = sys.argv[1], sys.stdin.read() if len(sys.argv) > 2 else None
headers = {{"content-type": "application/json"}}
for attempt in range(60):
    request = urllib.request.Request("{URL}" + path, body.encode() if body else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            print(answer.read().decode())
            sys.exit(0)
    except urllib.error.HTTPError as error:
        if error.code != 503:
            print(error.read().decode())
            sys.exit(0)
    except OSError:
        pass
    time.sleep(1)
sys.exit(1)
"""


def ask(on_host: OnHost, path: str, body: Any = None) -> Any:
    """The answer of the service, asked on the host itself."""
    command = f"python3 -c {shlex.quote(FETCH)} {shlex.quote(path)}"
    if body is not None:
        command = f"echo {shlex.quote(json.dumps(body))} | {command} body"
    return json.loads(on_host(OCR, command, timeout=90).check().stdout)


def test_a_photo_is_read_by_the_embedded_pipeline(on_host: OnHost) -> None:
    part = {"inlineData": {"mimeType": "image/jpeg", "data": b64(photo(400, 300))}}
    answer = ask(
        on_host, "/v1beta/models/gemini-2.5-flash:generateContent", {"contents": [{"parts": [part]}]}
    )
    reading = json.loads(answer["candidates"][0]["content"]["parts"][0]["text"])
    assert len([name for name in reading if not name.startswith("_")]) == 11
    assert reading["_needs_review"] is True, "there is no plate in it"
    assert answer["modelVersion"].endswith("rapidocr+parser")


def test_it_runs_as_a_user_without_rights(on_host: OnHost) -> None:
    show = "systemctl show -p User,NoNewPrivileges,ProtectSystem,Nice"
    for unit in ("ocr-api.service", "ocr-worker@1.service"):
        text = on_host(OCR, f"{show} {unit}").check().stdout
        assert "User=ocr" in text
        assert "NoNewPrivileges=yes" in text
        assert "ProtectSystem=strict" in text
    sudo = on_host(OCR, "sudo stat -c '%U %G %a' /etc/ocr /etc/ocr/service.json /var/lib/ocr").check().stdout
    assert sudo.splitlines() == ["root ocr 750", "root ocr 640", "ocr ocr 750"]


def test_a_worker_that_is_killed_is_replaced(on_host: OnHost) -> None:
    pid = "systemctl show -p MainPID --value ocr-worker@1.service"
    before = on_host(OCR, pid).check().stdout.strip()
    on_host(OCR, f"sudo kill -9 {before}").check()
    assert ask(on_host, "/ready")["status"] == "ready"
    on_host(OCR, f"for n in $(seq 30); do test $({pid}) -gt 1 && exit 0; sleep 1; done; exit 1").check()
    assert on_host(OCR, pid).check().stdout.strip() != before
