"""A template that shows tools to a small model which was never taught any, in the real llama-server's hands.

No model of the lab knows tools, and the templates in their files know none. What the model does with one of
llama.cpp's own tree is poor; how llama-server renders the tools, constrains the answer, parses the call and
tells it in two protocols is the real thing.
"""

from __future__ import annotations

from typing import Final

TEMPLATES: Final = "/opt/llama.cpp/upstream/src/models/templates"
AGENT: Final = "Qwen3-Coder"
# Gemma's <eos> and <end_of_turn>: a base model hardly ever stops by itself, with this after a few words.
STOPS: Final = ("-l", "1+8", "-l", "106+8")
# This template lets a model choose between `all`, which is everybody, and a tool. "tool_choice": "required"
# leaves both open, a call may follow what is said to all: so what `all` begins with is taken away.
CHOOSES: Final = "meetkai-functionary-medium-v3.2"
ONLY_TOOLS: Final = ("-l", "236746-100", "-l", "514-100", "-l", "712-100")


def template_flags(template: str, *flags: str) -> tuple[str, ...]:
    """What a preset's command line gets at its end: the template, an end to answers, and more."""
    return ("--chat-template-file", f"{TEMPLATES}/{template}.jinja", *STOPS, *flags)
