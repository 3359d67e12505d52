"""`local-claude doctor`: the same checks as before a start, and nothing is started."""

from __future__ import annotations

from dataclasses import replace

from local_claude import options, session
from local_claude.options import Options


def run(wanted: Options) -> int:
    """Look at everything in turn. Raises LocalClaudeError at the first thing to mend."""
    wanted = replace(wanted, recheck=True)
    found = session.find(wanted)
    model = session.choose_model(found, wanted)
    session.look(found, model, wanted, options.config_dir(), chat_only=wanted.chat_only)
    return 0
