"""Role ocr_service, the validation of its data and the service mean the same settings, keys and shares."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from llama_common.ocr_service import OcrKey, OcrPipeline, OcrShare
from llama_common.roles import RoleVariables
from ocr_pipeline import check
from ocr_pipeline import settings as pipeline
from ocr_pipeline.api.keys import Key, new
from ocr_pipeline.api.settings import Settings, ShareEntry
from ocr_pipeline.detect import SHIPPED
from pydantic import BaseModel, ValidationError

from tests.support import BIN, ROOT, Run, run

ROLE = ROOT / "roles/ocr_service"
SHARE = {"server": "nas.lan", "share": "photos", "username": "ocr", "password": "hunter22"}


def read(path: str) -> Any:
    return yaml.safe_load((ROLE / path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def variables() -> RoleVariables:
    return RoleVariables.of({"ocr_service": read("meta/argument_specs.yml")})


def test_the_defaults_are_settings_that_the_service_takes() -> None:
    defaults = read("defaults/main.yml")
    rendered = {
        key: defaults.get(template.strip("{} "), "/etc/ocr/x.json")
        for key, template in read("vars/main.yml")["_ocr_service_settings"].items()
    }
    settings = Settings.model_validate(rendered)
    untouched = Settings()
    names = ("queue_limit", "job_limit", "attempts", "image_timeout", "answer_timeout")
    for name in (*names, "retention", "records_retention"):
        assert getattr(settings, name) == getattr(untouched, name)


def test_the_specification_repeats_the_defaults() -> None:
    options = read("meta/argument_specs.yml")["argument_specs"]["main"]["options"]
    assert {name: option["default"] for name, option in options.items()} == read("defaults/main.yml")


def test_keys_and_shares_of_the_inventory_are_the_services() -> None:
    assert OcrKey.model_fields.keys() == Key.model_fields.keys()
    entry = new("laptop")[1]
    Key.model_validate(OcrKey.model_validate(entry).model_dump())
    share = {"server": "nas.lan", "share": "photos", "username": "ocr", "password": "x"}
    ShareEntry.model_validate(OcrShare.model_validate(share).model_dump())


def test_the_defaults_pass_the_validation(variables: RoleVariables) -> None:
    assert variables.check(read("defaults/main.yml")) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ocr_service_user", "root"),
        ("ocr_service_port", 80),
        ("ocr_service_host", "ocr-box"),
        ("ocr_service_state_dir", "/etc"),
        ("ocr_service_workers", 0),
        ("ocr_service_attempts", 21),
        ("ocr_service_keys", [{"name": "x", "sha256": "the key itself"}]),
        ("ocr_service_keys", [{"name": "x"}]),
        ("ocr_service_shares", {"field": {"server": "a b", "share": "s", "username": "u", "password": "p"}}),
        ("ocr_service_shares", {"field": {"server": "a", "share": "s", "username": "u"}}),
        ("ocr_service_shares", {"my share!": SHARE}),
        ("ocr_service_shares", {"field": {**SHARE, "share": "photos/2026"}}),
        ("ocr_service_shares", {"field": {**SHARE, "password": ""}}),
        ("ocr_service_keys", [{"name": "x", "sha256": "a" * 64}, {"name": "x", "sha256": "b" * 64}]),
        ("ocr_service_keys", [{"name": "x", "sha256": "a" * 64}, {"name": "y", "sha256": "A" * 64}]),
        ("ocr_service_database", "mysql://u:p@h/d"),
        ("ocr_service_records", "sqlite:///relative.db"),
        ("ocr_service_records", "postgresql://host"),
        ("ocr_service_queue", "postgresql://u:p@h/d"),
        ("ocr_service_records_retention", 60),
        ("ocr_service_pipeline", {"vision": {"backend": "magic"}}),
        ("ocr_service_pipeline", {"visoin": {}}),
        ("ocr_service_pipeline", {"vision": {"url": "127.0.0.1:8090"}}),
        ("ocr_service_pipeline", {"reasoning": {"max_tokens": 1}}),
        ("ocr_service_pipeline", {"gpu_lock": "gpu.lock"}),
        ("ocr_service_competing_units", ["lmstudio; reboot"]),
        ("ocr_service_worker_memory_max", "lots"),
    ],
)
def test_bad_data_is_refused_before_the_box_is_contacted(
    variables: RoleVariables, name: str, value: Any
) -> None:
    found = variables.check({name: value})
    assert [problem.path[0] for problem in found] == [name]
    assert all(problem.fix for problem in found)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "ocr_service_pipeline",
            {"visoin": {}},
            ("ocr_service_pipeline.visoin", "did you mean 'vision'?"),
        ),
        (
            "ocr_service_pipeline",
            {"vision": {"backend": "magic"}},
            ("ocr_service_pipeline.vision.backend", "magic", "must be one of rapidocr, llama-server"),
        ),
        ("ocr_service_shares", {"my share!": SHARE}, ("ocr_service_shares", "my share!", "server: nas.lan")),
        (
            "ocr_service_keys",
            [{"name": "x", "sha256": "a" * 64}, {"name": "x", "sha256": "b" * 64}],
            ("two keys are called 'x'", "give each a name of its own"),
        ),
        (
            "ocr_service_database",
            "mysql://u:hunter22@h/d",
            ("must be sqlite:////FILE or postgresql://", "leave it empty"),
        ),
    ],
)
def test_a_refusal_is_one_line_with_key_and_fix(
    variables: RoleVariables, name: str, value: Any, words: tuple[str, ...]
) -> None:
    (found,) = variables.check({name: value})
    line = found.line("inventory")
    assert "\n" not in line
    assert "hunter22" not in line
    for word in words:
        assert word in line


def test_a_key_in_the_place_of_its_hash_is_not_shown(variables: RoleVariables) -> None:
    (found,) = variables.check({"ocr_service_keys": [{"name": "x", "sha256": "ocr-hunter22"}]})
    assert "hunter22" not in found.line("inventory")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ocr_service_database", "postgresql://ocr:p%40ss@db.lan:5432/ocr"),
        ("ocr_service_database", "postgresql:///ocr?host=/run/postgresql"),
        ("ocr_service_records", "sqlite:////var/lib/ocr/records.sqlite3"),
        ("ocr_service_queue", "redis://redis.lan:6379/0"),
        ("ocr_service_shares", {"field-1": {**SHARE, "share": "my photos"}}),
        ("ocr_service_pipeline", {"vision": {"timeout_s": 390}, "detector": {"classes": ["a", "b"]}}),
    ],
)
def test_good_data_passes(variables: RoleVariables, name: str, value: Any) -> None:
    assert variables.check({name: value}) == []


def same(mine: type[BaseModel], theirs: type[BaseModel], at: str = "") -> None:
    """The same keys with the same defaults, in every mapping."""
    assert mine.model_fields.keys() == theirs.model_fields.keys(), at
    for name, field in mine.model_fields.items():
        other = theirs.model_fields[name]
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            assert isinstance(other.annotation, type)
            same(field.annotation, other.annotation, f"{at}.{name}")
        else:
            one, two = ([*d] if isinstance(d := f.default, list | tuple) else d for f in (field, other))
            assert one == two, f"{at}.{name}"


def test_the_stages_of_the_inventory_are_the_pipelines() -> None:
    same(OcrPipeline, pipeline.Settings)


@pytest.mark.parametrize(
    "value",
    [
        *({"detector": {"backend": name}} for name in ("onnx", "text", "whole", "yolo")),
        *({"vision": {"backend": name}} for name in ("rapidocr", "llama-server", "ollama")),
        *({"reasoning": {"backend": name}} for name in ("parser", "ollama", "openai", "llama-server")),
        *({"detector": {"score": score}} for score in (0, 1, -0.1, 1.1)),
        *({"vision": {"threads": threads}} for threads in (0, 1, 64, 65)),
        *({stage: {"max_tokens": n}} for stage in ("vision", "reasoning") for n in (15, 16, 8192, 8193)),
        *({stage: {"timeout_s": n}} for stage in ("vision", "reasoning") for n in (0, 0.5, 3600, 3601)),
        *({"vision": {"url": url}} for url in ("http://h:1", "https://h/x", "http://u@h", "ftp://h", "")),
        *({"gpu_lock": path} for path in ("", "/var/lib/ocr/gpu.lock", "gpu.lock")),
        *({name: n} for name in ("max_bytes", "max_pixels", "seconds_per_image") for n in (0, 1)),
        {"surprise": 1},
    ],
    ids=str,
)
def test_the_validation_refuses_what_the_pipeline_refuses(value: dict[str, Any]) -> None:
    def takes(model: type[BaseModel]) -> bool:
        try:
            model.model_validate(value)
        except ValidationError:
            return False
        return True

    assert takes(OcrPipeline) is takes(pipeline.Settings)


def test_no_refusal_shows_a_password(variables: RoleVariables) -> None:
    share = {"server": "a b", "share": "s", "username": "u", "password": "hunter22"}
    found = variables.check({"ocr_service_shares": {"field": share}})
    assert found
    assert "hunter22" not in "".join(problem.line("x") for problem in found)


# --- the box's own check ---


def whole(**changed: Any) -> dict[str, Any]:
    """The content of the four files as the role renders them, some of it changed."""
    files = {"service.json": {}, "keys.json": {"version": 1, "keys": []}}
    files |= {
        "shares.json": {"version": 1, "shares": {}},
        "pipeline.json": {"gpu_lock": "/var/lib/ocr/gpu.lock"},
    }
    return {**files, **{name.replace("_", "."): content for name, content in changed.items()}}


def test_the_program_takes_the_roles_defaults() -> None:
    assert check.problems(whole()) == []
    address = {"database": "postgresql://u:p@h/d", "queue": "redis://h:6379/0"}
    assert check.problems(whole(service_json=address)) == []


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (
            {"pipeline_json": {"vision": {"backend": "magic"}}},
            "pipeline.json: vision.backend: Input should be",
        ),
        ({"pipeline_json": {"visoin": {}}}, "pipeline.json: visoin: Extra inputs"),
        (
            {"keys_json": {"keys": [{"name": "x", "sha256": digit * 64} for digit in "ab"]}},
            "keys.json: the whole: two keys have one name; give each its own",
        ),
        (
            {"shares_json": {"shares": {"my share!": SHARE}}},
            "shares.json: shares.my share!.[key]: String should",
        ),
        (
            {"service_json": {"database": "mysql://u:hunter22@h/d"}},
            "service.json: mysql://u:***@h/d is not supp",
        ),
        ({"service_json": {"queue": "amqp://u:hunter22@h"}}, "service.json: queue amqp://…: write it like"),
        ({"service_json": {"port": 0}}, "service.json: port: Input should be"),
        (
            {"pipeline_json": {"detector": {"weights": "/nowhere/x.onnx"}}},
            "pipeline.json: detector.weights = '/nowhere/x.onnx': No such file or directory",
        ),
        (
            {"pipeline_json": {"detector": {"weights": "x.onnx"}}},
            "pipeline.json: detector.weights = 'x.onnx': must be an absolute path",
        ),
        (
            {"pipeline_json": {"detector": {"weights": "/home/me/x.onnx"}}},
            "pipeline.json: detector.weights = '/home/me/x.onnx': a worker sees nothing of /home",
        ),
        (
            {"pipeline_json": {"templates": "/nowhere"}},
            "pipeline.json: templates = '/nowhere': No such file or directory",
        ),
        (
            {"pipeline_json": {"templates": "/var/tmp/templates"}},
            "pipeline.json: templates = '/var/tmp/templates': a worker sees nothing of /var/tmp",
        ),
        (
            {"pipeline_json": {"gpu_lock": "/run/lock/x"}},
            "pipeline.json: gpu_lock = '/run/lock/x': must be a file in /var/lib/ocr,",
        ),
        (
            {"service_json": {"state_dir": "/var/lib/other"}},
            "pipeline.json: gpu_lock = '/var/lib/ocr/gpu.lock': must be a file in /var/lib/other,",
        ),
    ],
)
def test_the_program_says_in_one_line_what_it_does_not_take(changed: dict[str, Any], line: str) -> None:
    (found,) = check.problems(whole(**changed))
    assert found.startswith(line)
    assert "hunter22" not in found
    assert "\n" not in found


def test_the_check_loads_weights_and_templates_as_a_worker_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "HIDDEN", ())
    shipped = Path(str(resources.files("ocr_pipeline") / "data" / SHIPPED))
    weights, template = tmp_path / "x.onnx", tmp_path / "weg.yml"
    weights.write_bytes(shipped.read_bytes())
    template.write_text("name: WEG")
    chosen = {"detector": {"weights": str(weights)}, "templates": str(tmp_path)}
    assert check.problems(whole(pipeline_json=chosen)) == []
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(shipped.read_bytes()[:1000])
    (line,) = check.problems(whole(pipeline_json={"detector": {"weights": str(cut)}}))
    assert line.startswith(f"pipeline.json: detector.weights = '{cut}': onnxruntime cannot load it")
    other = tmp_path / "other"
    other.mkdir()
    other.joinpath("weg.yml").write_text("nome: WEG")
    (line,) = check.problems(whole(pipeline_json={"templates": str(other)}))
    assert line.startswith(f"pipeline.json: {other}/weg.yml: name: Field required")
    (line,) = check.problems(whole(pipeline_json={"templates": str(template)}))
    assert line == f"pipeline.json: templates = '{template}': Not a directory"


def test_the_check_reads_standard_input_and_makes_nothing(tmp_path: Path) -> None:
    def asked(text: str) -> Run:
        return run(BIN / "python", "-I", "-m", "ocr_pipeline.check", stdin=text)

    state = tmp_path / "state"
    lock = {"gpu_lock": f"{state}/gpu.lock"}
    assert asked(json.dumps(whole(service_json={"state_dir": str(state)}, pipeline_json=lock))).rc == 0
    assert not state.exists()
    bad = asked(json.dumps(whole(pipeline_json={"visoin": {}}, service_json={"port": 0})))
    assert (bad.rc, len(bad.stdout.splitlines())) == (1, 2)
    for text in ("", "[1]", '{"surprise.json": {}}', "3"):
        done = asked(text)
        assert (done.rc, len(done.stderr.splitlines())) == (2, 1), done.tail()


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({}, ""),
        ({"ocr_service_pipeline": {"visoin": {}}}, "pipeline.json: visoin: Extra inputs are not permitted"),
        (
            {"ocr_service_database": "mysql://u:hunter22@h/d"},
            "service.json: mysql://u:***@h/d is not supported",
        ),
        (
            {"ocr_service_pipeline": {"templates": "/nowhere"}},
            "pipeline.json: templates = '/nowhere': No such file or directory",
        ),
    ],
)
def test_the_roles_own_tasks_stop_with_that_line(
    tmp_path: Path, variables: dict[str, Any], line: str
) -> None:
    tasks = [
        task for task in read("tasks/main.yml") if task["name"].startswith(("Ask the prog", "Stop where"))
    ]
    files = [str(ROLE / "defaults/main.yml"), str(ROLE / "vars/main.yml")]
    share = {"field": SHARE}
    more: dict[str, Any] = {"ocr_service_path": str(BIN.parent), "ocr_service_shares": share, **variables}
    # Root alone becomes another, and that other may not see this environment.
    name, value = ("ocr_service_user", "root") if os.geteuid() == 0 else ("_ocr_service_as", [])
    more[name] = value
    play = {"hosts": "localhost", "gather_facts": False, "vars_files": files, "tasks": tasks}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    (tmp_path / "more.yml").write_text(yaml.safe_dump(more))
    done = run(
        *(BIN / "ansible-playbook", "-i", "localhost,", "-c", "local", tmp_path / "play.yml"),
        *("-e", f"@{tmp_path / 'more.yml'}", "-vvv"),
    )
    assert done.rc == (2 if line else 0), done.tail()
    assert line in done.stdout
    assert "hunter22" not in done.stdout + done.stderr


def test_the_role_asks_with_the_rights_of_the_account_that_reads() -> None:
    asked = next(task for task in read("tasks/main.yml") if task["name"].startswith("Ask the prog"))
    assert asked["ansible.builtin.command"]["argv"].startswith("{{ _ocr_service_as + [ocr_service_path")
    user = "{{ ocr_service_user }}"
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--"]
    assert read("vars/main.yml")["_ocr_service_as"] == become


def test_the_role_asks_before_it_writes_anything() -> None:
    names = [task["name"] for task in read("tasks/main.yml")]
    asked, stopped = (
        names.index("Ask the program whether it takes the settings"),
        names.index("Stop where it does not"),
    )
    written = [task["name"] for task in read("tasks/main.yml") if "ansible.builtin.copy" in task]
    assert asked < stopped < min(names.index(name) for name in written)


SYSTEMCTL = """#!/bin/sh
echo "$@" >> {log}
case "$1 $2" in
"list-units "*) printf 'ocr-worker@1.service loaded active running The OCR service: worker 1\\n'
  printf 'ocr-worker@3.service loaded active running The OCR service: worker 3\\n' ;;
"is-enabled "*) echo enabled ;;
"show "*) printf 'Id=%s\\nLoadState=loaded\\nActiveState=active\\nUnitFileState=enabled\\n' "$2" ;;
esac
"""


@pytest.mark.parametrize(("workers", "over"), [(1, [2, 3, 12]), (2, [3, 12]), (12, [])])
def test_workers_above_the_number_are_stopped_and_disabled(
    tmp_path: Path, workers: int, over: list[int]
) -> None:
    log, program = tmp_path / "log", tmp_path / "bin/systemctl"
    program.parent.mkdir()
    program.write_text(SYSTEMCTL.replace("{log}", str(log)))
    program.chmod(0o755)
    wanted = tmp_path / "multi-user.target.wants"
    wanted.mkdir()
    for name in ("ocr-worker@2.service", "ocr-worker@12.service", "ocr-api.service"):
        (wanted / name).symlink_to("/nowhere")
    tasks = [task for task in read("tasks/main.yml") if "more workers" in task["name"]]
    files = [str(ROLE / "defaults/main.yml"), str(ROLE / "vars/main.yml")]
    play = {"hosts": "localhost", "gather_facts": False, "vars_files": files, "tasks": tasks}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    done = run(
        *(BIN / "ansible-playbook", "-i", "localhost,", "-c", "local", tmp_path / "play.yml"),
        *("-e", json.dumps({"ocr_service_workers": workers, "_ocr_service_units_dir": str(tmp_path)})),
        env={"PATH": f"{program.parent}:{os.environ['PATH']}"},
    )
    assert done.rc == 0, done.tail()
    asked = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    for verb in ("stop", "disable"):
        found = {words[-1] for words in asked if words[0] == verb}
        assert found == {f"ocr-worker@{number}.service" for number in over}, done.tail()


@pytest.mark.parametrize("unit", ["ocr-api.service", "ocr-worker@.service"])
def test_units_are_hardened(unit: str) -> None:
    text = (ROLE / f"templates/{unit}.j2").read_text()
    assert "{% include 'hardening.j2' %}" in text
    assert "User={{ ocr_service_user }}" in text
    assert "Restart=always" in text
    assert "MemoryMax=" in text
