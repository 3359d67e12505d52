"""The full path of the OCR service on its lab host: a real llama-server behind :8090 for both model stages.

It has a real small model, and takes pictures through a projector of random weights: what it transcribes is
nonsense. So the answers say nothing of plates, and everything of the protocol, the schema and the grounding.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ocr_pipeline.grounding import grounded
from ocr_pipeline.reading import FIELDS, Reading
from ocr_pipeline.stages import Line
from ocr_pipeline.synthetic.scene import sample

from tests.lab import tiny_projector
from tests.lab.test_ocr_service import OCR, URL, ask
from tests.ocr.service import generate
from tests.support import BIN, LAB_INVENTORY, PlaybookRun, Run, ansible_playbook, run

OnHost = Callable[..., Any]
PROJECTOR = "/srv/tiny-projector.gguf"
EMBEDDING = 576  # of SmolLM2 135M
SERVER = "http://127.0.0.1:8090"
UNIT = "llama-vision.service"
PLAY_S = 1500  # llama.cpp is compiled for the box, from the compiler's cache or not
ANSWER_S = 920
READ = "/v1beta/models/gemini-2.5-flash:generateContent"
# What the production box has, with the lab's build and model.
VISION = {
    "description": "SmolLM2 135M Instruct with a projector of random weights",
    "build": "upstream",
    "model": "smollm2-135m-instruct-q4_1",
    "projector": "tiny-projector",
    "context": 4096,
    "kv_cache_type": "f16",
    "n_gpu_layers": 0,
    "threads": 1,  # on a busy machine threads that wait for each other take many times as long
    "agent": False,
    "scope": "system",
    "listen": "127.0.0.1:8090",
}
PIPELINE: dict[str, Any] = {
    "vision": {
        "backend": "llama-server",
        "url": SERVER,
        "model": "vision",
        "timeout_s": 390,
        "max_tokens": 96,
    },
    "reasoning": {"backend": "openai", "url": SERVER, "model": "vision", "timeout_s": 390, "max_tokens": 256},
    "seconds_per_image": 800,
}

# A reasoning server that makes a serial number up, whatever it is asked.
INVENTOR, INVENTED = "ocr-inventor", "QX904177"
INVENTS = f"""
import http.server, json
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{"data": [{{"id": "vision"}}]}})
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        fields = json.dumps({{"numero_serie": "{INVENTED}"}})
        self.answer({{"choices": [{{"message": {{"content": fields}}}}]}})
    def answer(self, what):
        data = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
http.server.HTTPServer(("127.0.0.1", 8099), Handler).serve_forever()
"""

# One request on the host: status and text of the answer, [0, why] without one.
ASK = f"""
import json, sys, urllib.error, urllib.request
body = sys.stdin.buffer.read() if len(sys.argv) > 2 else None
request = urllib.request.Request(sys.argv[1], body, {{"content-type": "application/json"}})
try:
    with urllib.request.urlopen(request, timeout={ANSWER_S}) as answer:
        print(json.dumps([answer.status, answer.read().decode()]))
except urllib.error.HTTPError as error:
    print(json.dumps([error.code, error.read().decode()]))
except OSError as error:
    print(json.dumps([0, str(error)]))
"""


def play(folder: Path, *options: str, **variables: Any) -> PlaybookRun:
    """ocr_server.yml, with these variables of the OCR host."""
    file = folder / "more.yml"
    file.write_text(yaml.safe_dump({"all": {"hosts": {OCR: variables}}}))
    return ansible_playbook("playbooks/ocr_server.yml", "-i", file, *options, timeout=PLAY_S)


def verify_health() -> Run:
    """The health check of the OCR host, and whether it is what the last play deployed."""
    return run(
        *(BIN / "python", "scripts/verify_health.py", "--inventory", LAB_INVENTORY),
        *("--limit", OCR, "--drift"),
        timeout=240,
    )


@pytest.fixture
def wanted(on_host: OnHost, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A box's variables with the preset, whose projector is there; afterwards it is the lab's own again."""
    data = tiny_projector.write(tmp_path / "projector.gguf", EMBEDDING).read_bytes()
    encoded = base64.b64encode(data).decode()
    on_host(OCR, f"base64 -d | sudo tee {PROJECTOR} > /dev/null", stdin=encoded, timeout=120).check()
    models = yaml.safe_load((LAB_INVENTORY / "group_vars/llama_hosts/models.yml").read_text())["gguf_models"]
    projector = {"path": PROJECTOR, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    yield {
        "gguf_models": {**models, "tiny-projector": projector},
        "llama_presets": {"vision": VISION},
        "ocr_service_pipeline": PIPELINE,
        "ocr_service_image_timeout": 900,
        "ocr_service_answer_timeout": 900,
    }
    play(tmp_path).check()
    on_host(OCR, f"sudo systemctl stop {INVENTOR}.service || true").check()
    on_host(OCR, f"sudo rm -f {PROJECTOR} ~llm/models/gguf/*tiny-projector*").check()


def post(on_host: OnHost, path: str, body: dict[str, Any]) -> Any:
    """The answer of the service to a photo, which takes its time without a GPU."""
    command = f"python3 -c {shlex.quote(ASK)} {URL}{path} body"
    answered = on_host(OCR, command, stdin=json.dumps(body), timeout=ANSWER_S + 20).check()
    status, answer = json.loads(answered.stdout)
    assert status == 200, answer
    return json.loads(answer)


def status_of(on_host: OnHost, url: str) -> int:
    """The status that an address on the host answers with; 0 where nobody does."""
    return int(json.loads(on_host(OCR, f"python3 -c {shlex.quote(ASK)} {url}").check().stdout)[0])


def wait_for_status(on_host: OnHost, url: str, status: int) -> None:
    """Until an address answers so."""
    deadline = time.monotonic() + 60
    while (found := status_of(on_host, url)) != status:
        assert time.monotonic() < deadline, found
        time.sleep(1)


@pytest.mark.long
def test_a_photo_takes_the_full_path_and_its_answer_is_in_the_schema_and_grounded(
    on_host: OnHost, tmp_path: Path, wanted: dict[str, Any]
) -> None:
    assert play(tmp_path, **wanted).check().changed > 0
    shown = on_host(OCR, f"systemctl show -p User,ActiveState,UnitFileState,ProtectSystem {UNIT}")
    assert set(shown.check().stdout.split()) == {
        *("User=llm", "ActiveState=active", "UnitFileState=enabled", "ProtectSystem=strict"),
    }
    again = play(tmp_path, **wanted).check()
    assert again.changed == 0, again.tail()
    verify_health().check()

    assert ask(on_host, "/ready")["status"] == "ready"
    body = generate(sample(7001, "easy").jpeg())
    answer = post(on_host, READ, body)
    assert answer["modelVersion"].endswith("llama-server+openai")
    flat = json.loads(answer["candidates"][0]["content"]["parts"][0]["text"])
    Reading.model_validate(flat)
    seen = post(on_host, "/api/v41/ocr/poste/P1/texto", body)
    printed = [Line(line["texto"]) for line in seen["linhas"]]
    assert printed, "the vision server has transcribed something"
    given = {name: flat[name] for name in FIELDS if flat[name] is not None}
    ungrounded = {name: value for name, value in given.items() if not grounded(name, value, printed)}
    assert not ungrounded, (ungrounded, printed)

    # The model of nonsense may give no value at all, and then none is ungrounded: one that is made up is
    # dropped.
    on_host(OCR, f"sudo systemd-run --unit={INVENTOR} python3 -c {shlex.quote(INVENTS)}").check()
    inventor = {**PIPELINE, "reasoning": {**PIPELINE["reasoning"], "url": "http://127.0.0.1:8099"}}
    assert play(tmp_path, **{**wanted, "ocr_service_pipeline": inventor}).check().changed > 0
    assert ask(on_host, "/ready")["status"] == "ready"
    answer = post(on_host, READ, body)
    flat = json.loads(answer["candidates"][0]["content"]["parts"][0]["text"])
    assert flat["numero_serie"] is None
    assert "not_grounded:numero_serie" in flat["_reasons"], "the reasoning server was asked"

    # A changed command restarts it; without it the service says so, and stays up.
    changed = {**wanted, "llama_presets": {"vision": {**VISION, "context": 2048}}}
    assert play(tmp_path, **changed).check().changed > 0
    running = on_host(OCR, f"tr '\\0' ' ' < /proc/$(systemctl show -p MainPID --value {UNIT})/cmdline")
    assert "--ctx-size 2048" in running.check().stdout
    on_host(OCR, f"sudo systemctl stop {UNIT}").check()
    wait_for_status(on_host, f"{URL}/ready", 503)
    assert status_of(on_host, f"{URL}/health") == 200
    fell_short = verify_health()
    assert fell_short.rc == 1
    assert f"{UNIT} of the system = inactive, wanted active" in fell_short.stdout, fell_short.tail()

    # Without the preset the unit goes, and the service reads with what it carries.
    assert play(tmp_path).check().changed > 0
    assert status_of(on_host, f"{SERVER}/health") == 0
    gone = on_host(OCR, f"systemctl show -p LoadState --value {UNIT}").check().stdout.strip()
    assert gone == "not-found"
    assert post(on_host, READ, body)["modelVersion"].endswith("rapidocr+parser")
    verify_health().check()
