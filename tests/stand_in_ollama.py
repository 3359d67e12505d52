#!/usr/bin/env python3
"""A stand-in for Ollama's program, which no package registry has: `serve`, and as much of its API as is used.

Standard library only, for it runs as `bin/ollama` of a stand-in archive (`archive`). It has no models: what
it answers to a chat is made up, and one value of it is printed nowhere.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import tarfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REGISTRY = ("qwen2.5:14b", "tiny:latest")
MADE_UP = "99999999"


def digest(name: str) -> str:
    """The digest that a model of this name has."""
    return hashlib.sha256(name.encode()).hexdigest()


def archive() -> bytes:
    """The release archive: this file as bin/ollama, and a library beside it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data, mode in (
            ("bin/ollama", Path(__file__).read_bytes(), 0o755),
            ("lib/ollama/README", b"a stand-in has no libraries\n", 0o644),
        ):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), mode
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def models_dir() -> Path:
    """Where its models lie."""
    return Path(os.environ["OLLAMA_MODELS"])


def full(name: str) -> str:
    """A name with its tag."""
    return name if ":" in name else f"{name}:latest"


def chat(body: dict[str, Any]) -> str:
    """What a model says to the lines of a nameplate; a value that is not printed among it."""
    lines = json.loads(body["messages"][-1]["content"])
    power = next((found[1] for line in lines if (found := re.search(r"([0-9.]+) *kVA", line))), None)
    said = dict.fromkeys(body["format"]["properties"])
    said |= {"potencia_kva": float(power) if power else None, "numero_serie": MADE_UP}
    return json.dumps(said)


class Handler(BaseHTTPRequestHandler):
    """The part of its API that is used here."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def answer(self, *objects: dict[str, Any], status: int = 200) -> None:
        """JSON objects, one a line."""
        data = b"".join(json.dumps(one).encode() + b"\n" for one in objects)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> dict[str, Any]:
        """The request's object."""
        found: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        return found

    def do_GET(self) -> None:
        """Version, and the list of models."""
        if self.path == "/api/version":
            self.answer({"version": "0.0.0-stand-in"})
        elif self.path == "/api/tags":
            names = sorted(path.read_text() for path in models_dir().glob("*"))
            self.answer({"models": [{"name": name, "digest": digest(name)} for name in names]})
        else:
            self.answer({"error": "not found"}, status=404)

    def do_POST(self) -> None:
        """Pull, and chat."""
        body = self.body()
        name = full(body["model"])
        file = models_dir() / digest(name)
        if self.path == "/api/pull" and name not in REGISTRY:
            self.answer({"status": "pulling manifest"}, {"error": "pull model manifest: file does not exist"})
        elif self.path == "/api/pull":
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(name)
            self.answer({"status": "pulling manifest"}, {"status": "success"})
        elif self.path == "/api/chat" and file.exists():
            self.answer(
                {"model": name, "done": True, "message": {"role": "assistant", "content": chat(body)}}
            )
        else:
            self.answer({"error": f"model '{name}' not found"}, status=404)

    def do_DELETE(self) -> None:
        """Delete a model."""
        (models_dir() / digest(full(self.body()["model"]))).unlink()
        self.answer()


if __name__ == "__main__":
    if sys.argv[1:] != ["serve"]:
        sys.exit("a stand-in for ollama: serve is all that it knows")
    host, _, port = os.environ["OLLAMA_HOST"].rpartition(":")
    ThreadingHTTPServer((host, int(port)), Handler).serve_forever()
