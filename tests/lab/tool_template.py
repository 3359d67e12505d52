"""Models that call tools, in the hands of the real llama-server.

No model of the lab was ever taught tools, and the templates in their files know none. A drop-in gives a
preset one of the templates of llama.cpp's own tree. What the model does with it is poor; how llama-server
renders the tools, constrains the answer, parses the call and tells it in two protocols is the real thing.
"""

from __future__ import annotations

import base64
import gzip
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab import config
from scripts import _rote_model
from scripts._tool_template import CHOOSES as CHOOSES
from scripts._tool_template import ONLY_TOOLS as ONLY_TOOLS
from scripts._tool_template import template_flags
from tests.lab.test_lmswitch import Box


@contextmanager
def tool_template(box: Box, preset: str, template: str, *flags: str) -> Iterator[None]:
    """The preset serves with this template and these flags; afterwards nothing serves."""
    with _serving(box, preset, *template_flags(template, *flags)):
        yield


@contextmanager
def calling(box: Box, preset: str, folder: Path, name: str, arguments: dict[str, Any]) -> Iterator[None]:
    """The preset serves a model that calls this tool (scripts/_rote_model.py); afterwards nothing serves."""
    file = folder / "rote.gguf"
    models = config.from_environment().cache / "sources/models"
    _rote_model.write(file, next(models.glob(_rote_model.VOCABULARY)), name, arguments)
    packed = base64.b64encode(gzip.compress(file.read_bytes())).decode()
    place = f"{box.wanted.home}/rote.gguf"
    box.run(f"base64 -d | gzip -d | sudo -u {box.wanted.user} tee {place} > /dev/null", stdin=packed).check()
    try:
        with _serving(box, preset, "--model", place):
            yield
    finally:
        box.run(f"sudo rm {place}").check()


@contextmanager
def _serving(box: Box, preset: str, *flags: str) -> Iterator[None]:
    presets = json.loads(box.run(f"cat {box.wanted.presets_json}").check().stdout)["presets"]
    command = shlex.join([*presets[preset]["command"], *flags])
    box.write_drop_in(preset, f"[Service]\nExecStart=\nExecStart={command}\n")
    try:
        box.lmswitch("--restart", preset).check()
        yield
    finally:
        box.remove_drop_in(preset)
        box.lmswitch("off").check()
