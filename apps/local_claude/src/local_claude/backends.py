"""Where each backend looks for its server, and how one is started where none answers."""

from __future__ import annotations

from typing import NamedTuple


class Backend(NamedTuple):
    """One value of --backend. `kinds` are the servers it accepts, empty for all; `starts` is what it runs."""

    name: str
    summary: str
    port: int
    kinds: tuple[str, ...] = ()
    starts: str = ""  # "": connects only; llama, ssh, apfel
    to_start: str = ""


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "remote",
            "a running server, or an llmbox gateway (default)",
            1234,
            to_start="start the server there (an llmbox box: `ssh llm@HOST lmswitch PRESET`), "
            "or correct --host and --port",
        ),
        Backend(
            "llama", "starts llama-server here, on a free port; stops it at the end", 0, ("llama",), "llama"
        ),
        Backend(
            "remote-llama",
            "the same on --host over SSH; ends when the session or the connection does",
            0,
            ("llama",),
            "ssh",
        ),
        Backend("lmstudio", "LM Studio", 1234, ("lmstudio",), to_start="type: lms server start --port 1234"),
        Backend("ollama", "Ollama", 11434, ("ollama",), to_start="type: ollama serve"),
        Backend(
            "vllm",
            "vLLM",
            8000,
            ("vllm",),
            to_start="type: vllm serve MODEL --enable-auto-tool-choice --tool-call-parser PARSER",
        ),
        Backend(
            "apfel",
            "Apple Intelligence through apfel: 4096 tokens, chat only",
            11434,
            ("apfel",),
            "apfel",
            to_start="type: apfel --serve",
        ),
    )
}
DEFAULT = "remote"
LOCAL = "127.0.0.1"
