"""Keys are kept out of every log: `?key=`, the headers that carry one, passwords in addresses."""

from __future__ import annotations

import logging
import re

HIDDEN = "***"
_SECRETS = (
    (re.compile(r"(?i)([?&;](?:api_?)?key=)[^&\s\"'#]+"), r"\1" + HIDDEN),
    (re.compile(r"(?i)(x-goog-api-key['\"]?\s*[:=,]\s*b?['\"]?)[^\s\"',)]+"), r"\1" + HIDDEN),
    (
        re.compile(r"(?i)(authorization['\"]?\s*[:=,]\s*b?['\"]?(?:bearer|basic)\s+)[^\s\"',)]+"),
        r"\1" + HIDDEN,
    ),
    (re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}"), r"\1" + HIDDEN),
    (re.compile(r"(\w://[^\s:/@]*:)[^\s@/]+(?=@)"), r"\1" + HIDDEN),
    (re.compile(r"(?i)(passw(?:or)?d['\"]?\s*[:=]\s*['\"]?)[^\s\"',)]+"), r"\1" + HIDDEN),
    (re.compile(r"\bocr-[A-Za-z0-9_-]{43}\b"), "ocr-" + HIDDEN),
)


def redact(text: str) -> str:
    """The text without a key or a password."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class RedactingFormatter(logging.Formatter):
    """Formats whole records, tracebacks included, and redacts what comes out."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def set_up(level: str = "INFO") -> None:
    """One handler for everything this process logs: to stderr, for the journal, without a secret."""
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in (
        "uvicorn",
        "uvicorn.error",
        "uvicorn.access",
        "huey",
        "smbprotocol",
        "alembic",
        "sqlalchemy.engine",
    ):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # smbprotocol tells of every packet at INFO.
    logging.getLogger("smbprotocol").setLevel("WARNING")
    logging.getLogger("spnego").setLevel("WARNING")
    for name in ("httpx", "huey"):
        logging.getLogger(name).setLevel("WARNING")
