"""The OCR service on its lab host, as the role deployed it: the embedded pipeline, under systemd."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from scripts import verify_health
from scripts._ask_host import ask as ask_host
from scripts._inventory import load
from scripts._ocr_box import OcrBox
from tests import support
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
    for unit, nice in (("ocr-api.service", 0), ("ocr-worker@1.service", 10)):
        text = on_host(OCR, f"{show} {unit}").check().stdout
        assert f"Nice={nice}" in text.splitlines(), "who asks goes before who reads"
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


def test_its_log_is_the_journal_which_rotates(on_host: OnHost) -> None:
    """No file of its own grows; what it says after a rotation is in the next journal, which has a limit."""

    def said(path: str, *files: str) -> bool:
        journal = f"sudo journalctl {' '.join(files)} -u ocr-api.service -o cat --grep '{path} 404'"
        return bool(on_host(OCR, journal).rc == 0)

    ask(on_host, "/before-the-rotation")
    on_host(OCR, "sudo journalctl --sync --rotate").check()
    ask(on_host, "/after-the-rotation")
    on_host(OCR, "sudo journalctl --sync").check()
    active = ("--file '/var/log/journal/*/system.journal'",)
    assert (said("/before-the-rotation"), said("/after-the-rotation")) == (True, True)
    assert (said("/before-the-rotation", *active), said("/after-the-rotation", *active)) == (False, True)
    limit = on_host(
        OCR, "sudo journalctl -u systemd-journald -o cat --grep 'System Journal .* max [0-9.]+[MG],'"
    )
    assert limit.check().stdout
    own = on_host(OCR, "sudo find /var/lib/ocr /var/log -user ocr -type f -name '*log*' ! -name '*.sqlite3*'")
    assert own.check().stdout == ""


def test_what_a_hand_changes_on_the_box_is_named(on_host: OnHost) -> None:
    """Settings, a unit, a file of the environment, what starts at boot; put back, it is as deployed again."""
    files = (
        "/etc/ocr/pipeline.json",
        "/etc/systemd/system/ocr-worker@.service",
        "$(realpath /opt/ocr/lib/python3*/site-packages/ocr_pipeline/grounding.py)",
    )
    unit = "ocr-worker@1.service"

    def drift() -> list[str]:
        report = on_host(OCR, "sudo llmbox-drift check --json", timeout=120)
        return [one["path"].rpartition("/")[2] for one in json.loads(report.stdout)["drift"]]

    def each(command: str) -> None:
        on_host(OCR, f"sudo sh -c 'for file in {' '.join(files)}; do {command}; done'").check()

    assert drift() == []
    each("cp -a $file $file.kept; echo >> $file")
    try:
        on_host(OCR, f"sudo systemctl disable {unit}").check()
        found = drift()
    finally:
        each("mv $file.kept $file")
        on_host(OCR, f"sudo systemctl enable {unit}").check()
    assert set(found) >= {"pipeline.json", "ocr-worker@.service", "grounding.py", f"{unit} of the system"}
    assert drift() == []


def test_each_layer_that_protects_the_gpu_is_missed_when_it_is_taken_away(on_host: OnHost) -> None:
    """The program's, the unit's and the host's; this host has no card, so its two are missing anyway."""
    (host,) = load(support.LAB_INVENTORY, limit=OCR)
    bare = OcrBox.of(host.variables)
    box = replace(bare, competing_units=("comfyui.service",), card=True)

    def missed(box: OcrBox) -> set[str]:
        seen = ask_host(host, {"ocr": box.request()}, become=True)
        checks = verify_health.ocr_checks(box, seen["ocr"], seen["command_line"])
        return {check.name for check in checks if not check.ok}

    assert missed(bare) == set()
    program = f"{bare.path}/lib/python3*/site-packages/ocr_pipeline/servers.py"
    drop_in = "/run/systemd/system/ocr-worker@.service.d/50-test.conf"
    line = "ExecStartPre=+-/usr/bin/systemctl stop comfyui.service"
    keep = f"sudo sh -c 'for file in {program} /etc/ocr/pipeline.json; do cp -a $file $file.kept; done'"
    restore = (
        f"sudo sh -c 'for file in {program}.kept /etc/ocr/pipeline.json.kept; do"
        " mv $file ${file%.kept}; done;"
        f" rm -f {drop_in}; systemctl daemon-reload'"
    )
    on_host(OCR, keep).check()
    try:
        on_host(
            OCR,
            f'sudo sh -c \'mkdir -p $(dirname {drop_in}); printf "[Service]\\n{line}\\n" >{drop_in};'
            " systemctl daemon-reload'",
        ).check()
        assert missed(box) == {"persistence", "kernel_pcie_aspm"}
        on_host(
            OCR,
            f"sudo sh -c 'rm {drop_in}; systemctl daemon-reload;"
            f' sed -i "s/return GpuHangError(/return DeadlineError(/" {program};'
            ' sed -i "s|\\"gpu_lock\\": \\"[^\\"]*\\"|\\"gpu_lock\\": \\"\\"|" /etc/ocr/pipeline.json\'',
        ).check()
        names = {"persistence", "kernel_pcie_aspm", "gpu_semaphore", "gpu_hang_error", "competing_units"}
        assert missed(box) == names
    finally:
        on_host(OCR, restore).check()
    assert missed(bare) == set()
