"""`local-claude`: the entry point. What it refuses is one line on standard error."""

from __future__ import annotations

import os
import sys

from local_claude import options
from local_claude.errors import LocalClaudeError

INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script. Returns only when claude does not take its place."""
    try:
        parsed = options.parse(sys.argv[1:] if argv is None else argv)
        if parsed.help:
            print(options.usage(), flush=True)
            return 0
        if parsed.doctor:
            from local_claude import doctor

            return doctor.run(parsed)
        from local_claude import session

        return session.run(parsed)
    except LocalClaudeError as error:
        print(f"local-claude: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
