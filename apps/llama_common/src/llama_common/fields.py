"""Types of single values: what a name, a path, a URL or a checksum may look like, and how to mend one."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Annotated, Any, Final
from urllib.parse import unquote, urlsplit

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_SOCKET_PATH_BYTES: Final = 107
"""sizeof(sockaddr_un.sun_path) is 108 with the closing NUL."""

CONTEXT_STEP: Final = 256
"""llama.cpp rounds the context of a slot up to a multiple of this (src/llama-context.cpp)."""

AGENT_CONTEXT_FLOOR: Final = 32768
"""Tokens a coding agent needs in one slot: its system prompt and its tools alone fill 20 to 25 thousand."""

KV_CACHE_TYPES: Final = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
"""What llama-server takes for --cache-type-k and -v (common/arg.cpp, kv_cache_types, b11434)."""

UNQUANTIZED_KV_CACHE_TYPES: Final = ("f32", "f16", "bf16")

LMSWITCH_VERBS: Final = ("off", "sleep", "resume", "status", "list", "logs", "help")
"""Words that mean something else to lmswitch than a preset's name."""

DRAFT_WORDS: Final = ("none", "auto")

FIRST_OPEN_PORT: Final = 1024
"""A user's service manager may not bind a port below this (net.ipv4.ip_unprivileged_port_start)."""

GGUF_PART: Final = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")


def refuse(message: str, fix: str) -> PydanticCustomError:
    """An error for a validator to raise, carrying its fix."""
    return PydanticCustomError("refused", "{message}", {"message": message, "fix": fix})


@dataclass(frozen=True)
class Text:
    """A string that must match `pattern` as a whole; `what` and `fix` explain it."""

    pattern: str
    what: str
    fix: str
    max_length: int = 255

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, core_schema.str_schema(strict=True))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "pattern": f"^{self.pattern}$", "maxLength": self.max_length}

    def check(self, value: str) -> str:
        """`value`, when it is allowed. Raises PydanticCustomError."""
        refuse_control_characters(value)
        if len(value) > self.max_length:
            raise refuse(f"{len(value)} characters; at most {self.max_length} are allowed", "shorten it")
        if not re.fullmatch(self.pattern, value):
            raise refuse(f"must be {self.what}", self.fix)
        return value


def refuse_control_characters(value: str) -> None:
    """Raise PydanticCustomError for anything that is not printable text on one line."""
    for position, character in enumerate(value):
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            raise refuse(
                f"has the control character U+{ord(character):04X} at position {position + 1}; "
                "only printable text on one line is allowed",
                "remove it (a plain one-line YAML string, no | or > block)",
            )


PresetName = Annotated[
    str,
    Text(
        r"[a-z0-9][a-z0-9-]{0,31}",
        "a name of 1 to 32 characters: a-z, 0-9 and -, beginning with a letter or digit",
        "rename it, for example qwen36-long",
    ),
]
BuildName = PresetName
ModelName = Annotated[
    str,
    Text(
        r"[a-z0-9][a-z0-9._-]{0,63}",
        "a name of 1 to 64 characters: a-z, 0-9, '.', '_' and '-', beginning with a letter or digit",
        "rename it, for example qwen3-coder-30b-q4_k_m",
        max_length=64,
    ),
]
Alias = Annotated[
    str,
    Text(
        r"[a-z0-9][a-z0-9-]{0,15}",
        "an alias of 1 to 16 characters: a-z, 0-9 and -",
        "shorten it, for example c",
    ),
]
Description = Annotated[
    str, Text(r"\S(?:.*\S)?", "a text without blanks at its ends", "write one line", max_length=120)
]
Commit = Annotated[
    str,
    Text(
        r"[0-9a-f]{40}",
        "a whole commit: 40 lower-case hexadecimal digits",
        "write the output of `git rev-parse`, or `ref:` and run scripts/lock_models.py",
    ),
]
Sha256 = Annotated[
    str,
    Text(
        r"[0-9a-f]{64}",
        "a SHA-256: 64 lower-case hexadecimal digits",
        "write the first word that `sha256sum FILE` prints, in quotes",
    ),
]
KeyName = Annotated[
    str,
    Text(
        r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}",
        "the name of a key's holder, 1 to 64 characters: letters, digits, '.', '_', '@' and '-'",
        "write it like laptop",
        max_length=64,
    ),
]
KeySha256 = Annotated[
    str,
    Text(
        r"[0-9a-f]{64}",
        "the SHA-256 of a key: 64 lower-case hexadecimal digits, never the key itself",
        "write the line that `llmbox-key new NAME` prints",
    ),
]
ModelPattern = Annotated[
    str,
    Text(
        r"\S+",
        "a model's name, in which * and ? stand for anything, without blanks",
        'write it like "claude-*"',
        max_length=100,
    ),
]
GitRef = Annotated[
    str,
    Text(
        r"(?!.*(?:\.\.|//|@\{|\.lock$|/$|\.$))[A-Za-z0-9][A-Za-z0-9._/+-]*",
        "a tag or branch name",
        "write a tag such as b11434",
        max_length=100,
    ),
]
HubRepo = Annotated[
    str,
    Text(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}",
        "owner/name of a Hugging Face repository",
        "write it as in the page's address, for example lmstudio-community/Qwen3-Coder-30B-A3B-Instruct-GGUF",
    ),
]
ExtraArgument = Annotated[
    str,
    Text(r"[\s\S]+", "a text of at least one character", "remove the empty item", max_length=4096),
]


def check_file_name(value: str) -> str:
    """One plain GGUF file name. Raises PydanticCustomError."""
    refuse_control_characters(value)
    if "/" in value or "\\" in value or value in (".", ".."):
        raise refuse(
            "must be a plain file name: no folder, no '..', no absolute path",
            "write the last part only; `path:` takes a local file",
        )
    if len(value.encode()) > 200:
        raise refuse(f"{len(value.encode())} bytes; at most 200 are allowed", "shorten the file name")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*\.gguf", value):
        raise refuse(
            "must be a file name of letters, digits, '.', '_', '+' and '-' that ends in .gguf",
            "rename it, for example model-Q4_K_M.gguf",
        )
    return value


def _hub_file(value: str) -> str:
    """A path inside a hub repository: folders are allowed, leaving the repository is not."""
    refuse_control_characters(value)
    folders = value.split("/")
    if any(part in ("", ".", "..") for part in folders):
        raise refuse(
            "must be a path inside the repository: no '..', no leading or double slash",
            "write it as the hub lists it",
        )
    for folder in folders[:-1]:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", folder):
            raise refuse("has a folder name with odd characters", "write it as the hub lists it")
    check_file_name(folders[-1])
    return value


def _local_path(value: str) -> str:
    """An absolute path on the host, without '..'."""
    refuse_control_characters(value)
    parts = value.split("/")
    if not value.startswith("/") or ".." in parts or value.endswith("/"):
        raise refuse(
            "must be an absolute path of a file, without '..'",
            "write it from /, for example /srv/models/model.gguf",
        )
    if len(value.encode()) > 1024:
        raise refuse(
            f"{len(value.encode())} bytes; at most 1024 are allowed", "move the file to a shorter path"
        )
    return value


def _url(value: str, schemes: tuple[str, ...], example: str) -> str:
    refuse_control_characters(value)
    if len(value) > 2048 or any(character.isspace() for character in value):
        raise refuse("must be one URL of at most 2048 characters without blanks", f"write it like {example}")
    try:
        parts = urlsplit(value)
        host, _port = parts.hostname, parts.port
    except ValueError as error:
        raise refuse(f"is not a URL ({error})", f"write it like {example}") from error
    if parts.scheme not in schemes:
        raise refuse(
            f"must be a URL that begins with {' or '.join(f'{scheme}://' for scheme in schemes)}",
            f"write it like {example}",
        )
    if parts.password is not None or (parts.username is not None and parts.scheme != "ssh"):
        raise refuse(
            "carries a user name or password, which would be stored in plain text",
            "remove what stands before the @",
        )
    if parts.scheme != "file" and not host:
        raise refuse("names no host", f"write it like {example}")
    return value


def _download_url(value: str) -> str:
    return _url(value, ("https", "http"), "https://host/path/model.gguf")


def _repo_url(value: str) -> str:
    _url(value, ("https", "http", "git", "ssh", "file"), "https://github.com/ggml-org/llama.cpp")
    parts = urlsplit(value)
    if parts.scheme == "file" and re.match(r"/+(home|root|run/user)(/|$)", unquote(parts.path)):
        raise refuse(
            "lies where a build cannot look: /home, /root and /run/user are hidden from it",
            "move the repository, for example to file:///srv/llama.cpp.git",
        )
    return value


def _endpoint(value: str) -> str:
    _url(value, ("https", "http"), "https://huggingface.co")
    return value.rstrip("/")


@dataclass(frozen=True)
class Checked:
    """A string checked by a function; `pattern` is what an editor can check of it."""

    function: Any
    pattern: str | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            self.function, core_schema.str_schema(strict=True)
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string"} | ({"pattern": self.pattern} if self.pattern else {})


FileName = Annotated[str, Checked(check_file_name, r"^[A-Za-z0-9][A-Za-z0-9._+-]*\.gguf$")]
HubFile = Annotated[
    str, Checked(_hub_file, r"^([A-Za-z0-9][A-Za-z0-9._+-]*/)*[A-Za-z0-9][A-Za-z0-9._+-]*\.gguf$")
]
LocalPath = Annotated[str, Checked(_local_path, "^/")]
DownloadUrl = Annotated[str, Checked(_download_url, "^https?://|\\{\\{")]
RepoUrl = Annotated[str, Checked(_repo_url, "^(https?|git|ssh|file)://|\\{\\{")]
Endpoint = Annotated[str, Checked(_endpoint, "^https?://|\\{\\{")]


@dataclass(frozen=True)
class Address:
    """Where a server listens: an IP address and a port, or the path of a UNIX socket."""

    host: str
    port: int | None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `127.0.0.1:8090`, `[::1]:8090` or `/run/x.sock`. Raises PydanticCustomError."""
        refuse_control_characters(text)
        if text.startswith("/"):
            return cls(_socket_path(text), None)
        host, colon, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        try:
            address = ip_address(bare)
        except ValueError as error:
            raise refuse(
                "must be IP:PORT or the absolute path of a socket that ends in .sock",
                'write it like "127.0.0.1:8090", "[::1]:8090" or /run/llama/vision.sock',
            ) from error
        if not colon or (address.version == 6) != host.startswith("["):
            raise refuse("an IPv6 address stands in brackets, before the port", 'write it like "[::1]:8090"')
        if not re.fullmatch(r"[1-9][0-9]{0,4}", port) or not 1 <= int(port) <= 65535:
            raise refuse("the port must be between 1 and 65535", 'write it like "127.0.0.1:8090"')
        return cls(str(address), int(port))

    @property
    def is_socket(self) -> bool:
        """Whether this is the path of a UNIX socket."""
        return self.port is None

    @property
    def base_url(self) -> str:
        """The URL under which this very host reaches it: `http://127.0.0.1:8090`, or `unix:///run/x.sock`."""
        if self.port is None:
            return f"unix://{self.host}"
        address = ip_address(self.host)
        if address.is_unspecified:
            address = ip_address("127.0.0.1" if address.version == 4 else "::1")
        return f"http://[{address}]:{self.port}" if address.version == 6 else f"http://{address}:{self.port}"

    def clashes_with(self, other: Address) -> bool:
        """Whether both cannot be bound at the same time."""
        if self.port is None or other.port is None:
            return self.port == other.port and self.host == other.host
        mine, theirs = ip_address(self.host), ip_address(other.host)
        return self.port == other.port and (mine == theirs or mine.is_unspecified or theirs.is_unspecified)


def _socket_path(path: str) -> str:
    size = len(path.encode())
    if size > MAX_SOCKET_PATH_BYTES:
        raise refuse(
            f"{size} bytes; the path of a UNIX socket has at most {MAX_SOCKET_PATH_BYTES}",
            "use a shorter folder, for example under /run",
        )
    if not path.endswith(".sock") or ".." in path.split("/") or not re.fullmatch(r"[A-Za-z0-9._/+-]+", path):
        raise refuse(
            "must be the absolute path of a socket that ends in .sock, without '..' and blanks",
            "write it like /run/llama/vision.sock",
        )
    return path


def _listen(value: str) -> str:
    Address.parse(value)
    return value


def _front(value: str) -> str:
    """Where clients reach the gateway."""
    address = Address.parse(value)
    if address.port is None:
        raise refuse("must be IP:PORT: clients reach the gateway over TCP", 'write it like "127.0.0.1:1234"')
    if address.port < FIRST_OPEN_PORT:
        raise refuse(
            f"port {address.port}: a user's service manager may not bind one below {FIRST_OPEN_PORT}",
            f"write a port from {FIRST_OPEN_PORT} to 65535",
        )
    return value


def _network(value: str) -> str:
    """An IP network. Raises PydanticCustomError."""
    refuse_control_characters(value)
    try:
        found = ip_network(value, strict=False)
    except ValueError as error:
        raise refuse(
            "must be an IP network in CIDR notation", "write it like 192.168.1.0/24 or fd00::/8"
        ) from error
    if str(found.network_address) != value.partition("/")[0]:
        raise refuse("is an address within a network, not the network", f"write {found}")
    return value


Listen = Annotated[str, Checked(_listen, r"^(/.+\.sock|.+:[0-9]{1,5})$")]
Front = Annotated[str, Checked(_front, r"^.+:[0-9]{1,5}$")]
Network = Annotated[str, Checked(_network, r"^[0-9a-fA-F.:]+(/[0-9]{1,3})?$")]

_FOREIGN_UNIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9:_.@\\-]*\.service")


def _foreign_unit(value: object) -> str:
    """The name of a user unit of somebody else's. Raises PydanticCustomError."""
    if isinstance(value, dict):
        if value.get("scope") == "system":
            name = str(value.get("name", "NAME.service"))
            raise refuse(
                "a user unit cannot conflict with a system unit: systemd keeps the two managers apart",
                f"run {name} as a user unit of the same account and write its plain name, or stop it: "
                f"systemctl disable --now {name}",
            )
        raise refuse("must be the plain name of a user unit", "write it like lmstudio.service")
    if not isinstance(value, str):
        raise refuse(f"must be text, not {type(value).__name__}", "write it like lmstudio.service")
    refuse_control_characters(value)
    if len(value) > 200 or not _FOREIGN_UNIT.fullmatch(value):
        raise refuse(
            "must be the name of a user unit that ends in .service", "write it like lmstudio.service"
        )
    return value


@dataclass(frozen=True)
class _ForeignUnit:
    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            _foreign_unit, serialization=core_schema.to_string_ser_schema()
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^[A-Za-z0-9].*\.service$"}


ForeignUnit = Annotated[str, _ForeignUnit()]

CMAKE_SWITCHES: Final = ("GGML_CUDA", "GGML_NATIVE", "GGML_BLAS", "LLAMA_OPENSSL", "LLAMA_CURL")
"""CMake options that roles act on themselves: packages, compilers, the sandbox of a unit."""

_CMAKE_WORDS: Final = {
    **dict.fromkeys(("on", "yes", "true", "y"), "true"),
    **dict.fromkeys(("off", "no", "false", "n"), "false"),
}
_CMAKE_VALUE = re.compile(r"[A-Za-z0-9 _.,;:=+/@-]*")
OWNED_CMAKE_OPTIONS: Final = (
    "CMAKE_INSTALL_PREFIX",
    "CMAKE_INSTALL_RPATH",
    "CMAKE_BUILD_WITH_INSTALL_RPATH",
    "CMAKE_C_COMPILER_LAUNCHER",
    "CMAKE_CXX_COMPILER_LAUNCHER",
    "LLAMA_BUILD_SERVER",
)
"""CMake variables that are the role llama_cpp's: releases run wherever they lie, with a server in them."""

CmakeName = Annotated[
    str,
    Text(
        rf"(?!(?:{'|'.join(OWNED_CMAKE_OPTIONS)})$)[A-Z][A-Z0-9_]{{0,63}}",
        "a CMake variable in capitals (A-Z, 0-9, _), other than those the role sets or relies on: "
        + ", ".join(OWNED_CMAKE_OPTIONS),
        "remove it, or write it as llama.cpp's docs/build.md does, for example GGML_CUDA",
    ),
]


def _cmake_value(value: object) -> bool | int | str:
    """What may stand after -DNAME=. Raises PydanticCustomError."""
    if isinstance(value, bool | int):
        return value
    if not isinstance(value, str):
        raise refuse(
            f"must be true, false, a number or text, not {type(value).__name__}",
            'write it like true or "89;120"',
        )
    refuse_control_characters(value)
    if len(value) > 256 or not _CMAKE_VALUE.fullmatch(value):
        raise refuse(
            "has characters other than letters, digits, blanks and _.,;:=+/@- (at most 256)",
            "remove quotes, $, backslashes and the like",
        )
    meant = _CMAKE_WORDS.get(value.strip().lower())
    if meant is not None:
        raise refuse(
            "is a word for true or false; an option has one way to say that",
            f"write {meant}, without quotes",
        )
    return value


@dataclass(frozen=True)
class _CmakeValue:
    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(_cmake_value)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": ["boolean", "integer", "string"]}


CmakeValue = Annotated[bool | int | str, _CmakeValue()]


def url_file_name(url: str) -> str:
    """The file name at the end of a URL, percent-decoded; empty when there is none."""
    return unquote(urlsplit(url).path.rpartition("/")[2])
