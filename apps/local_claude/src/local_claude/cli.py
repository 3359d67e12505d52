"""`local-claude`: the entry point. What it refuses is one line on standard error."""

from __future__ import annotations

import os
import sys

from local_claude import options
from local_claude.errors import EXIT_INTERRUPTED, EXIT_SETTINGS, LocalClaudeError, one_line


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script. Returns only when claude does not take its place."""
    open_what_is_closed()
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
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_INTERRUPTED
    except OSError as error:  # a full disk behind standard output, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        print(f"local-claude: {one_line(str(error))}; fix: mend that, and type it again", file=sys.stderr)
        return EXIT_SETTINGS


def open_what_is_closed() -> None:
    """A program that starts this one may have closed them: what is said then is said to nobody."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


if __name__ == "__main__":
    sys.exit(main())
