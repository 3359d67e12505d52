"""local-claude: the kinds of servers, what the doctor says of each, and what is recommended."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from local_claude import choose, cli, environment, launch, lmstudio, machine, servers, survey, translator
from local_claude.checks import Result
from local_claude.errors import EXIT_CONTEXT, EXIT_TOOLS, LocalClaudeError, one_line, shown
from local_claude.keeping import Kept, Order
from local_claude.servers import Found
from local_claude.wire import Server

from tests.support import ROOT
from tests.unit import scripted_llm
from tests.unit.scripted_llm import Answer, ScriptedLlm
from tests.unit.test_local_claude import started
from tests.unit.test_local_claude import world as world  # the fixture

LMSTUDIO_MODELS = [
    {
        "type": "llm",
        "key": "qwen/qwen3-coder-30b",
        "loaded_instances": [{"id": "qwen/qwen3-coder-30b", "config": {"context_length": 65536}}],
        "max_context_length": 262144,
    },
    {"type": "llm", "key": "openai/gpt-oss-20b", "loaded_instances": [], "max_context_length": 131072},
    {"type": "embedding", "key": "nomic", "loaded_instances": [], "max_context_length": 2048},
]
TITLES = ["openai/gpt-oss-20b", "qwen/qwen3-coder-30b"]
NO_PATH: Answer = (200, {"error": "Unexpected endpoint or method. (POST /v1/messages)"})
KINDS: dict[str, tuple[dict[str, Answer], str, str, dict[str, int | None], bool]] = {
    "gateway": (scripted_llm.gateway(), "gateway", "b11434-abc", {"coder": 98304, "gemma4": 98304}, True),
    "llama-server": (
        {
            "/v1/models": scripted_llm.models({"id": "gemma", "owned_by": "llamacpp"}),
            "/props": (200, {"default_generation_settings": {"n_ctx": 32768}, "build_info": "b11434-x"}),
        },
        "llama",
        "b11434-x",
        {"gemma": 32768},
        True,
    ),
    "LM Studio": (
        {
            "/v1/models": scripted_llm.models(
                *({"id": name, "owned_by": "organization_owner"} for name in TITLES)
            ),
            "/api/v1/models": (200, {"models": LMSTUDIO_MODELS}),
            "/v1/messages": (400, {"error": {"message": "model is required"}}),
        },
        "lmstudio",
        "",
        {"qwen/qwen3-coder-30b": 65536, "openai/gpt-oss-20b": None},
        True,
    ),
    "LM Studio before 0.4": (
        {
            "/v1/models": scripted_llm.models({"id": "a", "owned_by": "organization_owner"}),
            "/api/v1/models": NO_PATH,
            "/api/v0/models": (
                200,
                {
                    "data": [
                        {"id": "a", "type": "llm", "state": "loaded", "loaded_context_length": 8192}
                        | {"max_context_length": 131072}
                    ]
                },
            ),
            "/v1/messages": NO_PATH,
        },
        "lmstudio",
        "",
        {"a": 8192},
        False,
    ),
    "Ollama": (
        {
            "/v1/models": scripted_llm.models(
                {"id": "gpt-oss:20b", "owned_by": "library"}, {"id": "qwen:7b"}
            ),
            "/api/version": (200, {"version": "0.14.2"}),
            "/api/tags": (200, {"models": [{"name": "gpt-oss:20b"}, {"name": "qwen:7b"}]}),
            "/api/ps": (200, {"models": [{"name": "gpt-oss:20b", "context_length": 4096}]}),
            "/api/show": (200, {"parameters": 'num_ctx                        65536\nstop    "x"'}),
            "/v1/messages": (400, {"error": {"message": "model is required"}}),
        },
        "ollama",
        "0.14.2",
        {"gpt-oss:20b": 4096, "qwen:7b": 65536},
        True,
    ),
    "vLLM": (
        {
            "/v1/models": scripted_llm.models({"id": "my", "owned_by": "vllm", "max_model_len": 131072}),
            "/version": (200, {"version": "0.19.0"}),
            "/v1/messages": (400, {"error": {"message": "field required"}}),
        },
        "vllm",
        "0.19.0",
        {"my": 131072},
        True,
    ),
    "apfel": (
        {
            "/v1/models": scripted_llm.models({"id": "apple-foundationmodel", "owned_by": "apple"}),
            "/health": (200, {"status": "ok", "context_window": 4096, "version": "0.6.25"}),
        },
        "apfel",
        "0.6.25",
        {"apple-foundationmodel": 4096},
        False,
    ),
    "anything else": ({"/v1/models": scripted_llm.models({"id": "m"})}, "openai", "", {"m": None}, False),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_recognised(name: str) -> None:
    answers, kind, version, models, direct = KINDS[name]
    with ScriptedLlm(answers) as server:
        found = servers.identify(Server("http", "127.0.0.1", server.port))
        assert (found.kind.name, found.version) == (kind, version)
        assert {model.name: servers.context_of(found, model) for model in found.models} == models
        assert servers.speaks_messages(found) == direct


def test_each_backend_takes_only_its_kind(world: Path) -> None:
    for name, backend in (("Ollama", "ollama"), ("vLLM", "vllm"), ("LM Studio", "lmstudio")):
        with ScriptedLlm(KINDS[name][0]) as server:
            code = cli.main(["--backend", backend, "--port", str(server.port), "--model", "none"])
            assert code == 74
            others = {"ollama", "vllm", "lmstudio", "apfel"} - {backend}
            assert {cli.main(["--backend", other, "--port", str(server.port)]) for other in others} == {72}


def test_what_a_kind_cannot_do_is_a_warning_there(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {**KINDS["Ollama"][0], "/v1/messages": scripted_llm.says("Ready.")}
    with ScriptedLlm(answers) as server:
        became = started("--backend", "ollama", "--port", str(server.port), "--model", "qwen:7b", "-p", "x")
    told = capsys.readouterr().err
    assert "warn tool calls: none came" in told and "warn prompt cache: Ollama does not say" in told
    assert became.variables["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "65536"


def test_the_default_context_of_ollama_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedLlm(KINDS["Ollama"][0]) as server:
        assert cli.main(["--port", str(server.port), "--model", "gpt-oss:20b"]) == 75
    assert "OLLAMA_CONTEXT_LENGTH" in capsys.readouterr().err


# --- LiteLLM in front ---


def test_a_server_without_anthropic_s_api_gets_litellm(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []
    orders: list[Order] = []
    with (
        ScriptedLlm(KINDS["apfel"][0]) as server,
        ScriptedLlm({"/v1/messages": scripted_llm.called()}) as proxy,
    ):

        class Pretended(Kept):
            def __init__(self, order: Order) -> None:
                orders.append(order)

            def wait_ready(self, *_: object) -> None:
                pass

            def stop(self) -> None:
                stopped.append("LiteLLM")

        monkeypatch.setattr(translator, "Kept", Pretended)
        monkeypatch.setattr(translator, "free_port", lambda: proxy.port)
        monkeypatch.setenv("LOCAL_CLAUDE_LITELLM", "/bin/true")
        monkeypatch.setenv("HTTP_PROXY", "http://192.0.2.7:3128")
        monkeypatch.setenv("no_proxy", "internal.example")
        became = started("--backend", "apfel", "--port", str(server.port), "-p", "hi")
    (order,) = orders
    assert order.argv[0] == "/bin/true" and str(proxy.port) in order.argv
    assert order.environment["NO_PROXY"] == order.environment["no_proxy"] == "internal.example,127.0.0.1"
    assert became.variables["ANTHROPIC_BASE_URL"] == f"http://127.0.0.1:{proxy.port}"
    key = became.variables["ANTHROPIC_AUTH_TOKEN"]
    assert key == order.environment["LOCAL_CLAUDE_PROXY_KEY"] and key not in " ".join(order.argv)
    written = json.loads(order.remove[0].read_text())
    (model,) = written["model_list"]
    assert model["litellm_params"]["api_base"] == f"http://127.0.0.1:{server.port}/v1"
    assert "cache_control" in model["litellm_params"]["additional_drop_params"]
    assert key not in order.remove[0].read_text()
    assert set(launch.CHAT_ONLY) <= set(became.command), "4096 tokens are for a chat"
    assert "--strict-mcp-config" in became.command, "there is no room for the person's tools either"


def test_a_server_is_asked_once_whatever_it_serves() -> None:
    """A router's list has a model for each preset that a box serves."""
    models = [
        {"id": name, "owned_by": "llmbox", "context": 65536, "state": "active"} for name in ("coder", "chat")
    ]
    with ScriptedLlm({**scripted_llm.gateway(), "/v1/models": scripted_llm.models(*models)}) as server:
        found = servers.identify(Server("http", "127.0.0.1", server.port))
        assert [path for _, path, _ in server.asked] == ["/v1/models", "/props"]
    assert all(model.ready for model in found.models)


def test_litellm_is_installed_as_the_router_has_it() -> None:
    pinned = (ROOT / "apps/llm_router/requirements.lock").read_text()
    names = set(re.findall(r"^([a-z0-9-]+)==", pinned, re.MULTILINE))
    assert set(translator.PROXY) <= names and "litellm-enterprise" not in names
    assert f"\nlitellm=={translator.VERSION} " in pinned
    assert "[proxy]" not in translator.FIX and "enterprise" not in translator.FIX


# --- choosing with the arrow keys ---


@pytest.mark.parametrize(
    ("keys", "picked"),
    [
        ([b"\r"], 1),
        ([b"\x1b[B", b"\r"], 2),
        ([b"\x1b[B", b"\x1b[B", b"\r"], 0),
        ([b"\x1bOA", b"x", b"\n"], 0),
        ([b"\x1b[B\x1b[B", b"\x1bOB\r"], 1),
        ([b"q"], None),
        ([b"\x1b"], None),
        ([b""], None),
    ],
)
def test_arrow_keys(keys: list[bytes], picked: int | None) -> None:
    seen: list[str] = []
    pressed = iter(keys)
    assert choose.pick("Models", ["a", "b", "c"], 1, lambda: next(pressed), seen.append) == picked
    assert "Models" in seen[0] and any("> b" in text for text in seen)


@pytest.mark.parametrize(
    ("pieces", "read"),
    [
        ([b"\x1b", b"[B"], [b"\x1b[B"]),
        ([b"\x1b", b"[", b"B"], [b"\x1b[B"]),
        ([b"j\x1bO", b"A"], [b"j\x1bOA"]),
        ([b"\x1b"], [b"\x1b"]),
        ([b"\x1b[B", b"j"], [b"\x1b[B", b"j"]),
    ],
)
def test_an_arrow_key_that_comes_in_pieces(
    pieces: list[bytes], read: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a slow line. Escape alone is one as well, but nothing follows it at once."""
    left = list(pieces)
    monkeypatch.setattr(os, "read", lambda *_: left.pop(0))
    waited: list[float] = []

    def ready(reading: list[int], _w: list[int], _x: list[int], seconds: float) -> tuple[list[int], ...]:
        waited.append(seconds)
        return (reading if left else [], [], [])

    monkeypatch.setattr("select.select", ready)
    assert [choose.read_keys(0) for _ in read] == read and not left
    assert set(waited) <= {choose.TURN_S, choose.REST_S}


def test_a_ctrl_c_just_before_the_wait_is_heard_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that nobody types for would keep it: it is only begun when there is something to read."""
    turns = iter([False, False])

    def nobody_types(*_: Any) -> tuple[list[int], ...]:
        if next(turns, None) is None:
            raise KeyboardInterrupt
        return [], [], []

    monkeypatch.setattr("select.select", nobody_types)
    monkeypatch.setattr(os, "read", lambda *_: pytest.fail("it waits for a key"))
    with pytest.raises(KeyboardInterrupt):
        choose.read_keys(0)


def test_a_choice_at_a_terminal_reads_whole_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    typed, terminal = pty.openpty()
    pressed = iter([b"\x1b[B", b"\r"])
    monkeypatch.setattr(choose, "read_keys", lambda _: next(pressed))
    monkeypatch.setattr(os, "read", lambda *_: b"q")  # for who reads in another way
    with os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert choose.choose("Models", ["a", "b"]) == 1
    os.close(typed)


def test_the_end_of_what_is_typed_is_waited_for_once() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"\x1b")
    os.close(writing)
    assert choose.read_keys(reading) == b"\x1b"
    os.close(reading)


def drawn(written: list[str]) -> list[list[str]]:
    """Each picture of the list, as rows: what was written between two moves back up."""
    pictures = re.split(r"\x1b\[(\d+)A", "".join(written).split("\n", 1)[1])
    rows = [picture.replace("\x1b[K", "").splitlines() for picture in pictures[::2]]
    assert [len(each) for each in rows[:-1]] == [int(height) for height in pictures[1::2]]
    return [[re.sub(r"\x1b\[\d*m", "", row) for row in each] for each in rows]


def test_a_list_taller_and_wider_than_the_terminal() -> None:
    """What is drawn over again is exactly what stands there: as many lines as fit, none that wraps."""
    rows = [f"model {number} {'x' * 60}" for number in range(30)]
    pressed = iter([b"\x1b[A", b"\x1b[A", b"\r"])
    seen: list[str] = []
    assert choose.pick("Models", rows, 0, lambda: next(pressed), seen.append, lambda: (40, 8)) == 28
    pictures = drawn(seen)
    assert [[row.split()[1 if row[0] == " " else 2] for row in each] for each in pictures] == [
        ["0", "1", "2", "3", "4", "5"],
        ["24", "25", "26", "27", "28", "29"],
        ["24", "25", "26", "27", "28", "29"],
    ]
    assert [[row[0] for row in each].index(">") for each in pictures] == [0, 5, 4]
    assert all(len(row) < 40 for each in pictures for row in each) and pictures[0][0].endswith("x…")
    assert len(seen[0]) <= 40


@pytest.mark.parametrize("size", [(1, 1), (5, 2), (200, 100)])
def test_a_terminal_of_any_size(size: tuple[int, int]) -> None:
    pressed = iter([b"\x1b[B", b"\r"])
    assert choose.pick("Models", ["a", "b", "c"], 1, lambda: next(pressed), lambda _: None, lambda: size) == 2


# --- LM Studio's own files ---


def configuration(folder: Path, **values: Any) -> None:
    """A file as LM Studio keeps it for a model."""
    keys = {"k": lmstudio.K, "v": lmstudio.V, "context": lmstudio.CONTEXT}
    fields = [{"key": keys[name], "value": value} for name, value in values.items()]
    place = folder / "qwen"
    place.mkdir(exist_ok=True)
    (place / "coder.json").write_text(json.dumps({"load": {"fields": fields}}))


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"k": "q8_0", "v": "q8_0"}, ["silently ignored", '{"checked": true, "value": "q8_0"}']),
        ({"k": {"checked": False, "value": "q8_0"}}, ["not checked"]),
        (
            {"k": {"checked": True, "value": "q8_0"}, "v": {"checked": True, "value": "q4_0"}},
            ["K is q8_0, V is q4_0"],
        ),
        ({"context": 8192}, ["= 8192, below 32768"]),
        (
            {
                "k": {"checked": True, "value": "q8_0"},
                "v": {"checked": True, "value": "q8_0"},
                "context": 65536,
            },
            [],
        ),
    ],
)
def test_the_traps_of_lm_studio(values: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    configuration(tmp_path, **values)
    lines = [result.line for result in lmstudio.traps(tmp_path)]
    assert bool(lines) == bool(parts) and all(any(part in line for line in lines) for part in parts), lines


def test_other_files_of_lm_studio_are_no_trap(tmp_path: Path) -> None:
    for number, text in enumerate(["", "[]", "{}", '{"load": {"fields": [1]}}', '{"load": {"fields": {}}}']):
        (tmp_path / f"{number}.json").write_text(text)
    assert lmstudio.traps(tmp_path) == [] == lmstudio.traps(tmp_path / "nowhere")


# --- this machine ---

MACHINES = {
    "MacBook Air M5, 16 GB": ({"hw.memsize": str(16 * 2**30), "machdep.cpu.brand_string": "Apple M5"}, "E4B"),
    "MacBook Air M5, 32 GB": ({"hw.memsize": str(32 * 2**30), "machdep.cpu.brand_string": "Apple M5"}, "26B"),
    "MacBook Pro M5 Max, 128 GB": ({"hw.memsize": str(128 * 2**30)}, "31B"),
    "RTX 4070 Ti SUPER": ({"nvidia-smi": "16376, NVIDIA GeForce RTX 4070 Ti SUPER"}, "Qwen3-Coder"),
    "two cards": ({"nvidia-smi": "8192, small\n24576, big"}, "Qwen3-Coder"),
    "a driver that hangs": ({"nvidia-smi": ""}, ""),
}


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_gets_its_row(name: str) -> None:
    said, model = MACHINES[name]

    def ask(*argv: str) -> str:
        return said.get(argv[-1] if argv[0] == "sysctl" else argv[0], "")

    system = "Darwin" if "hw.memsize" in said else "Linux"
    found = machine.this_machine(system, ask)
    assert model in machine.recommend(found)["model"]
    assert found.memory_gib > 0


def test_the_table_has_a_row_for_everything() -> None:
    for system in ("apple", "nvidia", "cpu"):
        for memory in (0.0, 11.9, 16.0, 23.5, 36.0, 59.9, 1000.0):
            row = machine.recommend(machine.Machine(system, memory, "x"))
            assert row["system"] == system and row["from"] <= memory < row["to"]
    assert machine.of_context(8192) != machine.of_context(65536)
    assert "avoid" in machine.of_model("Meta-Llama-3.1-8B-Instruct") and machine.of_model("x") == ""


# --- the doctor ---


def doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    """Its exit code and lines."""
    code = cli.main(["doctor", *words])
    return code, capsys.readouterr().out.splitlines()


def working(body: Any) -> Answer:
    """A model that does everything right."""
    tools = {tool["name"] for tool in body.get("tools", [])}
    if "report" in tools:
        answer = scripted_llm.called()
        assert callable(answer)
        found: Answer = answer(body)
        return found
    numbers = "\n".join(str(number) for number in range(1, 41))
    call = {"name": "Read", "input": {"file_path": "notes.txt"}}
    if "Write" in tools:
        call = {"name": "Write", "input": {"file_path": "numbers.txt", "content": numbers}}
    return 200, {"content": [{"type": "tool_use", "id": "1", **call}], "stop_reason": "tool_use", "usage": {}}


def careless(body: Any) -> Answer:
    """A model that edits what it has not read, and never comes to an end."""
    if "report" in {tool["name"] for tool in body.get("tools", [])}:
        return working(body)
    call = {"type": "tool_use", "id": "1", "name": "Edit", "input": {}}
    return 200, {"content": [call], "stop_reason": "max_tokens", "usage": {}}


def test_the_doctor_of_a_sound_world(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedLlm(scripted_llm.gateway() | {"/v1/messages": working}) as server:
        code, lines = doctor(capsys, "--port", str(server.port))
    assert code == 0
    names = [line[5:].partition(":")[0] for line in lines]
    order = ["server", "context", "tool calls", "prompt cache", "stops in mid-edit", "invents files"]
    assert [name for name in dict.fromkeys(names) if name in order] == order
    assert all(line.startswith(("ok  ", "    ")) for line in lines), lines
    assert any("recommended:" in line for line in lines)


def test_the_doctor_of_a_careless_model(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedLlm(scripted_llm.gateway(context=32768) | {"/v1/messages": careless}) as server:
        code, lines = doctor(capsys, "--port", str(server.port))
    told = "\n".join(line for line in lines if line.startswith("warn"))
    assert code == 0 and "was cut after" in told and "has not read" in told and "CLAUDE.md" in told
    assert "tokens are left" in told


def test_the_doctor_of_a_model_whose_file_breaks_off(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where a server ends a call without saying so."""

    def half(body: Any) -> Answer:
        answer = json.loads(json.dumps(working(body)))
        for call in answer[1]["content"]:
            if call.get("name") == "Write":
                call["input"]["content"] = call["input"]["content"][:50]
        return answer[0], answer[1]

    with ScriptedLlm(scripted_llm.gateway() | {"/v1/messages": half}) as server:
        code, lines = doctor(capsys, "--port", str(server.port))
    (warned,) = (line for line in lines if line.startswith("warn"))
    assert code == 0 and "stops in mid-edit: a file of 40 lines came as " in warned


def test_a_model_that_is_not_loaded_is_judged_by_what_it_has_once_it_is(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ollama forgets it after five minutes, and tells its context only while it is loaded."""
    given, loaded = 65536, list[int]()

    def messages(body: Any) -> Answer:
        if not (body or {}).get("model"):
            return 400, {"error": {"message": "model is required"}}
        loaded.append(given)
        answer: Any = scripted_llm.called(cached=None)
        found: Answer = answer(body)
        return found

    def running(_: Any) -> Answer:
        return 200, {"models": [{"name": "qwen:7b", "context_length": count} for count in loaded[:1]]}

    answers: dict[str, Answer] = {
        "/v1/models": scripted_llm.models({"id": "qwen:7b", "owned_by": "library"}),
        "/api/version": (200, {"version": "0.14.2"}),
        "/api/tags": (200, {"models": [{"name": "qwen:7b"}]}),
        "/api/ps": running,
        "/api/show": (200, {"parameters": 'stop    "x"'}),
        "/v1/messages": messages,
    }
    with ScriptedLlm(answers) as server:
        words = ["--backend", "ollama", "--port", str(server.port), "-p", "x"]
        assert started(*words).variables["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] == "65536"
        given = 4096  # it was started anew, without OLLAMA_CONTEXT_LENGTH
        for _ in range(2):
            loaded.clear()
            assert cli.main(words) == EXIT_CONTEXT
            assert "4096 tokens, below the 32768" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("unforced", "code", "said"),
    [
        (
            (400, {"error": {"message": "requires --enable-auto-tool-choice"}}),
            EXIT_TOOLS,
            "--enable-auto-tool",
        ),
        (scripted_llm.says("<tool_call>{}</tool_call>"), EXIT_TOOLS, "the template leaks"),
        (scripted_llm.says('{"name": "report"}'), EXIT_TOOLS, "a tool call came back as prose"),
    ],
)
def test_a_vllm_that_parses_no_call_is_refused_though_it_can_be_forced(
    unforced: Answer, code: int, said: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it forces comes from a grammar; Claude Code never forces."""

    def messages(body: Any) -> Answer:
        if not (body or {}).get("model"):
            return 400, {"error": {"message": "field required"}}
        return scripted_llm.called(cached=None)(body) if "tool_choice" in body else unforced  # type: ignore[operator]

    answers: dict[str, Answer] = {
        "/v1/models": scripted_llm.models({"id": "my", "owned_by": "vllm", "max_model_len": 131072}),
        "/version": (200, {"version": "0.19.0"}),
        "/v1/messages": messages,
    }
    with ScriptedLlm(answers) as server:
        assert cli.main(["--backend", "vllm", "--port", str(server.port), "-p", "x"]) == code
        assert said in capsys.readouterr().err


def test_a_call_is_forced_where_that_tells_something(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, forced in (("llama-server", True), ("vLLM", False)):
        with ScriptedLlm(KINDS[name][0] | {"/v1/messages": working}) as server:
            doctor(capsys, "--port", str(server.port))
        checks_ = [
            body for _, path, body in server.asked if path == "/v1/messages" and "tools" in (body or {})
        ]
        reports = [body for body in checks_ if body["tools"][0]["name"] == "report"]
        assert reports and all(("tool_choice" in body) == forced for body in reports)


def test_the_doctor_looks_into_lm_studio_s_own_files(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = world / ".lmstudio/.internal/user-concrete-model-default-config"
    folder.mkdir(parents=True)
    configuration(folder, k="q8_0", v="q8_0", context=8192)
    for name, seen in (("LM Studio", True), ("Ollama", False)):
        with ScriptedLlm(KINDS[name][0] | {"/v1/messages": working}) as server:
            _, lines = doctor(capsys, "--port", str(server.port))
        told = [line for line in lines if line.startswith("warn LM Studio's files")]
        assert bool(told) == seen and all("coder.json" in line for line in told), lines
        assert any("silently ignored" in line for line in told) == seen


@pytest.mark.parametrize(
    ("answers", "code", "part"),
    [
        ({}, 72, "FAIL server"),
        (scripted_llm.gateway(context=8192), 75, "FAIL context"),
        (scripted_llm.gateway() | {"/v1/messages": scripted_llm.says("no")}, 76, "FAIL tool calls"),
    ],
)
def test_the_doctor_of_a_broken_world(
    answers: dict[str, Answer], code: int, part: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ScriptedLlm(answers) as server:
        found, lines = doctor(capsys, "--port", str(server.port))
    assert found == code and any(line.startswith(part) and "; fix: " in line for line in lines), lines


@pytest.mark.parametrize("given", ['{"file_path": "numb', None, ["a"], 5], ids=repr)
def test_the_doctor_of_a_call_that_the_server_could_not_parse(
    given: Any, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It passes the arguments on as they came: the very fault that is looked for."""

    def damaged(body: Any) -> Any:
        status, data = working(body)[:2]  # type: ignore[index]
        if "report" not in {tool["name"] for tool in body.get("tools", [])}:
            data["content"][0]["input"] = given
        return status, data

    with ScriptedLlm(scripted_llm.gateway() | {"/v1/messages": damaged}) as server:
        code, lines = doctor(capsys, "--port", str(server.port))
    told = [line for line in lines if line.startswith("warn")]
    assert code == 0 and len(told) == 1 and "recommended:" in lines[-1], lines
    assert "stops in mid-edit: the call of a tool came back damaged; fix: " in told[0]


def hangs_up(_body: Any) -> Answer:
    """A server that ends the connection without an answer."""
    raise ConnectionAbortedError


@pytest.mark.parametrize("later", [False, True], ids=["at the first message", "after the model has worked"])
def test_the_doctor_of_a_server_that_hangs_up(
    later: bool, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: dict[str, Answer] = {"/v1/models": scripted_llm.models({"id": "a"}), "/v1/messages": hangs_up}
    if later:
        answers = scripted_llm.gateway()
    with ScriptedLlm(answers) as server:

        def works(body: Any) -> Answer:
            server.answers["/v1/models"] = hangs_up
            return working(body)

        if later:
            server.answers["/v1/messages"] = works
        code, lines = doctor(capsys, "--port", str(server.port))
    assert code == 71 and "recommended:" in lines[-1], lines
    assert any(line.startswith("FAIL server: ") and "without an answer; fix: " in line for line in lines)


def test_the_doctor_touches_nothing(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(world.rglob("*"))
    with ScriptedLlm(scripted_llm.gateway() | {"/v1/messages": working}) as server:
        doctor(capsys, "--port", str(server.port))
    assert sorted(world.rglob("*")) == before


# --- macOS: paths and files as its documentation has them; no Mac was at hand ---


def test_claude_is_found_where_homebrew_and_its_own_installer_put_it(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (world / "bin/claude").unlink()
    own = world / ".local/bin/claude"
    own.parent.mkdir(parents=True)
    own.write_text("")
    own.chmod(0o755)
    assert launch.find_claude() == own
    assert "/opt/homebrew/bin/claude" in launch.PLACES
    assert "/Library/Application Support/ClaudeCode/managed-settings.json" in environment.MANAGED
    assert "/opt/homebrew/bin/llama-server" in survey.SERVERS and "~/.lmstudio/models" in survey.FOLDERS


@pytest.mark.parametrize("breaks", ["\n", "\x1b[2J", "\u2028", "\u202e", "\u0085"])
def test_nothing_breaks_a_line(breaks: str) -> None:
    assert one_line(f"a{breaks}b") == f"a\\u{ord(breaks[0]):04x}{breaks[1:]}b"
    assert breaks[0] not in shown(f"a{breaks}b")


def test_a_server_s_names_write_no_line_of_their_own(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, build = "a\nlocal-claude: ok   everything", "b1\x1b[2J\u202e"
    listed = scripted_llm.models({"id": name, "owned_by": "llamacpp"})
    with ScriptedLlm(scripted_llm.gateway(build=build) | {"/v1/models": listed}) as server:
        _, lines = doctor(capsys, "--port", str(server.port))
        cli.main(["--port", str(server.port), "--print-env"])
    said = [*lines, *capsys.readouterr().err.splitlines()]
    assert any("a\\u000alocal-claude" in line for line in said), said
    assert all(line.isprintable() and not line.startswith("local-claude: ok   everything") for line in said)


def test_a_key_is_in_no_text() -> None:
    server = Server("http", "127.0.0.1", 1234, "hush")
    assert "hush" not in repr(server) + str(Found(server, servers.KINDS["llama"], "", ()))


def test_a_result_is_one_line() -> None:
    result = Result("context", "fail", "8192 tokens", "more", 75)
    assert result.line == "FAIL context: 8192 tokens; fix: more"
    assert isinstance(result.error, LocalClaudeError) and result.error.code == 75
