"""The variables of the roles: types from their argument specifications, limits from LIMITS, checked together.

A role's variables begin with its name and `_`. Those that `presets.HostConfig` describes are left to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from types import GenericAlias
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from llama_common import ocr_service
from llama_common.fields import (
    Address,
    Checked,
    DownloadUrl,
    Endpoint,
    KeyName,
    KeySha256,
    Network,
    Text,
    refuse,
    refuse_control_characters,
)
from llama_common.firewall import FirewallNetwork, NetworkName
from llama_common.presets import HostConfig
from llama_common.problems import HIDDEN, Problem
from llama_common.translate import closest, misspelt, problems_of

OWNED: Final = frozenset(HostConfig.model_fields)
SECRET_SUFFIXES: Final = ("_token", "_password", "_secret")
ROUTER_KEYS: Final = "litellm_router_keys"
OCR_KEYS: Final = "ocr_service_keys"
PUBLIC_KEYS: Final = "llm_user_authorized_keys"
PUBLIC_KEY_FIX: Final = "write the whole line of a .pub file, in a list, e.g. ssh-ed25519 AAAA… name"


def _line(value: str) -> str:
    refuse_control_characters(value)
    return value


def _folder(value: str) -> str:
    refuse_control_characters(value)
    if not value.startswith("/") or any(part in ("", ".", "..") for part in value[1:].split("/")):
        raise refuse(
            "must be an absolute path, not '/' itself, without '.', '..' and '/' at its end",
            "write it from /, for example /srv/llm",
        )
    if len(value.encode()) > 1024:
        raise refuse(f"{len(value.encode())} bytes; at most 1024 are allowed", "use a shorter path")
    return value


def _folder_or_nothing(value: str) -> str:
    return _folder(value) if value else value


_SYSTEM = (
    *("/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc"),
    *("/root", "/run", "/sbin", "/sys", "/usr"),
)
_SHARED = ("/home", "/media", "/mnt", "/opt", "/srv", "/var", "/var/cache", "/var/lib", "/var/log")


def _own_folder(value: str) -> str:
    """A folder that may become an account's own."""
    _folder(value)
    if value in _SHARED or any(value == folder or value.startswith(f"{folder}/") for folder in _SYSTEM):
        raise refuse("is a folder of the system; it would be given to the user", "write it like /srv/llm")
    return value


def _public_key(value: str) -> str:
    """One line of an authorized_keys file; refused without a word of it, for it may be a private key."""
    # Every public key begins with its kind, and in base64 with the four bytes of that kind's length.
    if not re.fullmatch(r"(ssh|ecdsa|sk)-[\w@.-]+ AAAA[A-Za-z0-9+/]+=*( [^\n]*)?", value):
        raise refuse("is no public key in one line", PUBLIC_KEY_FIX)
    refuse_control_characters(value)
    return value


Line = Annotated[str, Checked(_line)]
OwnFolder = Annotated[str, Checked(_own_folder)]
PublicKey = Annotated[str, Checked(_public_key)]
Folder = Annotated[str, Checked(_folder)]
AccountName = Annotated[
    str,
    Text(
        r"(?!root$)[a-z_][a-z0-9_-]{0,31}",
        "the name of an unprivileged account, 1 to 32 characters: a-z, 0-9, _ and -, not root",
        "write it like llm",
    ),
]
GroupName = Annotated[
    str,
    Text(r"[a-z_][a-z0-9_-]{0,31}", "the name of a group: a-z, 0-9, _ and -", "write it like video"),
]
Package = Annotated[
    str,
    Text(
        r"[a-z0-9][a-z0-9+.-]+", "the name of a Debian package: a-z, 0-9, +, . and -", "write it like ccache"
    ),
]
AliasPrefix = Annotated[
    str,
    Text(
        r"[a-z][a-z0-9_-]{0,15}", "1 to 16 characters: a-z, 0-9, _ and -, a letter first", "write it like ll"
    ),
]
MemoryMax = Annotated[
    str,
    Text(
        r"(100|[1-9][0-9]?)%|[1-9][0-9]*[KMGT]?|infinity",
        "what systemd takes for MemoryMax=: bytes, with K, M, G or T behind them, or percent",
        'write it like 80% or "24G"',
    ),
]


def _ip_address(value: str) -> str:
    try:
        ip_address(value)
    except ValueError:
        raise refuse("must be an address, IPv4 or IPv6", "write it like 192.168.1.20") from None
    return value


IpAddress = Annotated[str, Checked(_ip_address, "^[0-9A-Fa-f:.]+$")]
StateFolder = Annotated[
    str,
    Text(r"/var/lib/[a-z0-9_-]+", "a folder of /var/lib, which systemd makes", "write it like /var/lib/ocr"),
]
OllamaSetting = Annotated[
    str,
    Text(
        r"(?!OLLAMA_(HOST|MODELS)$)(OLLAMA|CUDA|GGML)_[A-Z0-9_]+",
        "a setting of Ollama; OLLAMA_HOST and OLLAMA_MODELS follow from ollama_host, _port and _state_dir",
        "write it like OLLAMA_KEEP_ALIVE",
    ),
]
UnitValue = Annotated[
    str,
    Text(r'[^\x00-\x1f"\\%]{0,500}', 'a value without ", \\ and %', "write it like 5m"),
]

SystemUnit = Annotated[
    str,
    Text(
        r"[A-Za-z0-9][A-Za-z0-9:_.@-]{0,200}\.(service|socket|timer|target)",
        "the name of a systemd unit",
        "write it like lmstudio.service",
    ),
]

PackageGlob = Annotated[
    str,
    Text(
        r"[a-z0-9*?][a-z0-9+.*?-]*",
        "the name of a Debian package, with * and ?",
        "write it like linux-image-*",
    ),
]
DriverVersion = Annotated[
    str,
    Text(
        r"([0-9]{3,4}(\.[0-9]+){1,2}-[A-Za-z0-9.+~]+)?",
        "the vendor's package version in full",
        "write it like 580.159.03-1ubuntu1: apt-cache madison nvidia-open shows what there is",
    ),
]
CudaVersion = Annotated[
    str,
    Text(
        r"([0-9]+\.[0-9]+\.[0-9]+-[0-9]+)?",
        "the version of the package cuda-toolkit-MAJOR-MINOR in full",
        "write it like 13.0.3-1",
    ),
]
InterfaceName = Annotated[
    str, Text(r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,14})?", "the name of a network card", "write it like eno1")
]
# What decides over what boots is the boot loader's; a slip there takes a trip to the keyboard.
BOOT_PARAMETERS: Final = (
    *("root", "init", "rdinit", "initrd", "ro", "rw", "rootflags", "rootfstype", "rd.break"),
    # A machine without SSH.
    *("systemd.unit", "rd.systemd.unit", "systemd.mask", "single", "emergency", "rescue", "S", "s", "1"),
)


def _kernel_parameter(value: str) -> str:
    # No quotes, $ or spaces: it passes through the shell and through GRUB's own language.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*(=[A-Za-z0-9_.,:/@+-]*)?", value) or len(value) > 255:
        raise refuse(
            "must be one kernel parameter: a name, = and a plain value", "write it like pcie_aspm=off"
        )
    if value.partition("=")[0] in BOOT_PARAMETERS:
        raise refuse("decides over what boots, which is GRUB's own to say", "take it out")
    return value


def _once(values: list[str]) -> list[str]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise refuse(f"{value} is there twice", "take one out")
    return values


def _repository(value: str) -> str:
    if not re.fullmatch(r"https?://[A-Za-z0-9._~:/\[\]@-]+/", value):
        raise refuse(
            "must be the address of an apt repository, http or https, with / at its end", "add the /"
        )
    return value


KernelParameter = Annotated[str, Checked(_kernel_parameter)]
Fingerprint = Annotated[
    str,
    Text(r"[0-9A-F]{40}", "an OpenPGP fingerprint, 40 hexadecimal digits", "gpg --show-keys KEY shows it"),
]


Sha256 = Annotated[
    str, Text(r"[0-9a-fA-F]{64}", "a SHA-256, 64 hexadecimal digits", "copy it from who publishes the file")
]


class OllamaArchive(BaseModel):
    """A release of Ollama, or with nothing in it none."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: Annotated[
        str,
        Text(
            r"(https?|file)://[^\s@?#]+\.(tgz|tar\.gz|tar\.zst|tar\.xz)",
            "the address of an archive",
            "write it like https://HOST/ollama-linux-amd64.tar.zst",
        ),
    ] = ""
    sha256: Sha256 = ""

    @model_validator(mode="after")
    def _both(self) -> OllamaArchive:
        if bool(self.url) != bool(self.sha256):
            raise refuse(
                "must have url and sha256, or neither", "nothing unverified is installed: add the other"
            )
        return self


class OllamaModel(BaseModel):
    """A model that an Ollama is to have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[
        str,
        Text(
            r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}(:[A-Za-z0-9._-]{1,80})?",
            "a model's name, with its tag",
            'write it like "qwen2.5:14b"',
        ),
    ]
    digest: Sha256 = ""


AtLeast0 = Annotated[int, Field(ge=0)]
AtLeast1 = Annotated[int, Field(ge=1)]
UpToADay = Annotated[int, Field(ge=0, le=86400)]
SomeSeconds = Annotated[int, Field(ge=1, le=86400)]
GuardSeconds = Annotated[float, Field(gt=0, le=3600)]
Celsius = Annotated[int, Field(ge=1, le=120)]


class RouterKey(BaseModel):
    """Whoever may use the router, how much of it, and whether what is asked may leave the network."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: KeyName
    sha256: KeySha256
    requests_per_minute: AtLeast1 | None = None
    tokens_per_day: AtLeast1 | None = None
    cloud: bool = False
    cloud_tokens_per_day: AtLeast1 | None = None


def _listen(value: str) -> str:
    Address.parse(value)
    return value


def _distinct(keys: list[RouterKey]) -> list[RouterKey]:
    for index, key in enumerate(keys):
        if any(key.name == other.name or key.sha256 == other.sha256 for other in keys[:index]):
            raise refuse(f"the key {key.name!r} is there twice", "give each key a name and a hash of its own")
    return keys


LIMITS: Final[Mapping[str, Any]] = {
    "litellm_router_listen": Annotated[str, Checked(_listen)],
    ROUTER_KEYS: Annotated[list[RouterKey], AfterValidator(_distinct)],
    "litellm_router_box_keys": dict[str, Line],
    "litellm_router_tool_retries": Annotated[int, Field(ge=0, le=5)],
    "litellm_router_hold_size": Annotated[int, Field(ge=65536, le=2**28)],
    "litellm_router_hold_seconds": SomeSeconds,
    "litellm_router_health_interval": Annotated[int, Field(ge=1, le=3600)],
    "litellm_router_request_timeout": SomeSeconds,
    "litellm_router_retries": Annotated[int, Field(ge=0, le=10)],
    "litellm_router_stop_timeout": SomeSeconds,
    "litellm_router_log_max_size": Annotated[int, Field(ge=65536, le=2**40)],
    "litellm_router_log_keep": Annotated[int, Field(ge=0, le=1000)],
    "base_packages": list[Package],
    "base_package_lists_max_age": AtLeast0,
    # Below 1000 journald keeps no files for a user; 60000 is UID_MAX of Debian's login.defs.
    "llm_user_uid": Annotated[int, Field(ge=1000, le=60000)],
    "llm_user_name": AccountName,
    "llm_user_home": OwnFolder,
    PUBLIC_KEYS: list[PublicKey],
    "llm_user_groups": list[GroupName],
    "llmbox_user": AccountName,
    "llama_cpp_packages": list[Package],
    "llama_cpp_keep_releases": AtLeast1,
    "llama_cpp_build_jobs": AtLeast0,
    "llama_cpp_build_nice": Annotated[int, Field(ge=-20, le=19)],
    "llama_cpp_build_memory_max": MemoryMax,
    "llama_cpp_build_memory_min": AtLeast0,
    "llama_cpp_build_disk_min": AtLeast0,
    "llama_cpp_build_timeout": AtLeast1,
    "llama_cpp_follow_interval": AtLeast1,
    "gguf_models_dir": OwnFolder,
    "gguf_models_owner": AccountName,
    "gguf_models_reserve_bytes": AtLeast0,
    "gguf_models_hf_endpoint": Endpoint,
    "gguf_models_hf_token_file": Annotated[str, Checked(_folder_or_nothing)],
    "gguf_models_environment": dict[str, Line],
    "gguf_models_connect_timeout": AtLeast1,
    "gguf_models_stall_timeout": AtLeast1,
    "gguf_models_retries": AtLeast0,
    "gguf_models_follow_interval": AtLeast1,
    "llm_gateway_min_dwell": UpToADay,
    "llm_gateway_hold_timeout": SomeSeconds,
    "llm_gateway_commit_after": UpToADay,
    "llm_gateway_drain_timeout": UpToADay,
    "llm_gateway_request_timeout": SomeSeconds,
    "llm_gateway_shutdown_grace": UpToADay,
    "llm_gateway_stop_timeout": SomeSeconds,
    "llm_gateway_idle_unload": UpToADay,
    "llm_gateway_queue_limit": Annotated[int, Field(ge=1, le=100_000)],
    "llm_gateway_queue_limit_per_key": Annotated[int, Field(ge=1, le=100_000)],
    # A request takes two descriptors, and the unit has 65536.
    "llm_gateway_max_connections": Annotated[int, Field(ge=1, le=30_000)],
    "llm_gateway_max_body": Annotated[int, Field(ge=1024, le=2**31)],
    "llm_gateway_max_buffered": Annotated[int, Field(ge=1024, le=2**36)],
    "llm_gateway_networks": list[Network],
    "gpu_guard_interval": GuardSeconds,
    "gpu_guard_timeout": GuardSeconds,
    "gpu_guard_hold": GuardSeconds,
    "gpu_guard_temperature_warning": Celsius,
    "gpu_guard_temperature_critical": Celsius,
    "gpu_guard_thermal_throttle_reasons": list[AtLeast1],
    "gpu_guard_fatal_xids": list[AtLeast1],
    "gpu_guard_hook": list[Line],
    "gpu_guard_hook_timeout": GuardSeconds,
    "gpu_guard_events_keep": Annotated[int, Field(ge=1, le=10_000)],
    "gpu_guard_watchdog": Annotated[int, Field(ge=2, le=600)],
    "firewall_networks": dict[NetworkName, FirewallNetwork],
    "firewall_allow": dict[str, list[str]],
    "firewall_ports": dict[NetworkName, list[int | str]],
    "firewall_services": dict[NetworkName, list[int | str]],
    # Long enough for three attempts of ssh on a slow link, short enough to wait for.
    "firewall_confirm_timeout": Annotated[int, Field(ge=10, le=50)],
    "tailscale_key_sha256": Annotated[
        str, Text(r"[0-9a-f]{64}", "a SHA-256, 64 hexadecimal digits", "sha256sum the vendor's key file")
    ],
    "tailscale_login_timeout": Annotated[int, Field(ge=5, le=600)],
    "power_mac": Annotated[
        str,
        Text(
            r"|[0-9A-Fa-f]{2}([:-][0-9A-Fa-f]{2}){5}",
            "a MAC address, six pairs of hexadecimal digits",
            'write it like "02:00:5e:10:00:01"',
        ),
    ],
    "power_wake_port": Annotated[int, Field(ge=1, le=65535)],
    "power_wake_addresses": list[IpAddress],
    "power_wake_interval": Annotated[int, Field(ge=1, le=600)],
    "power_wake_timeout": Annotated[int, Field(ge=10, le=3600)],
    "power_down_timeout": Annotated[int, Field(ge=10, le=3600)],
    "power_windows_timeout": Annotated[int, Field(ge=10, le=3600)],
    "power_windows_ports": list[Annotated[int, Field(ge=1, le=65535)]],
    "gpu_host_driver_version": DriverVersion,
    "gpu_host_driver_packages": Annotated[list[Package], Field(min_length=1)],
    "gpu_host_cuda_version": CudaVersion,
    "gpu_host_repository": Annotated[str, Checked(_repository)],
    "gpu_host_repository_key": DownloadUrl,
    "gpu_host_repository_fingerprint": Fingerprint,
    "gpu_host_held_packages": list[PackageGlob],
    "gpu_host_power_limit": Annotated[int, Field(ge=0, le=1000)],
    "gpu_host_clock_max": Annotated[int, Field(ge=0, le=5000)],
    "gpu_host_kernel_parameters": Annotated[list[KernelParameter], AfterValidator(_once)],
    "gpu_host_reboot_timeout": SomeSeconds,
    "gpu_host_wake_on_lan": InterfaceName,
    "local_claude_shells": list[Literal["bash", "zsh"]],
    "local_claude_alias_prefix": AliasPrefix,
    "llm_gateway_audit_max_size": Annotated[int, Field(ge=4096, le=2**40)],
    "llm_gateway_audit_keep": Annotated[int, Field(ge=1, le=1000)],
    "ollama_archive": OllamaArchive,
    "ollama_models": list[OllamaModel],
    "ollama_host": IpAddress,
    "ollama_port": Annotated[int, Field(ge=1024, le=65535)],
    "ollama_user": AccountName,
    "ollama_state_dir": StateFolder,
    "ollama_environment": dict[OllamaSetting, UnitValue],
    "ollama_memory_max": MemoryMax,
    "ollama_start_timeout": SomeSeconds,
    "ollama_stall_timeout": SomeSeconds,
    "ocr_service_user": AccountName,
    "ocr_service_host": IpAddress,
    "ocr_service_port": Annotated[int, Field(ge=1024, le=65535)],
    "ocr_service_state_dir": StateFolder,
    "ocr_service_workers": Annotated[int, Field(ge=1, le=64)],
    **ocr_service.LIMITS,
    "ocr_service_queue_limit": Annotated[int, Field(ge=1, le=1_000_000)],
    "ocr_service_job_limit": Annotated[int, Field(ge=1, le=1_000_000)],
    "ocr_service_attempts": Annotated[int, Field(ge=1, le=20)],
    "ocr_service_image_timeout": SomeSeconds,
    "ocr_service_answer_timeout": SomeSeconds,
    "ocr_service_retention": Annotated[int, Field(ge=3600, le=366 * 86400)],
    "ocr_service_records_retention": Annotated[int, Field(ge=3600, le=3660 * 86400)],
    "ocr_service_recycle_images": Annotated[int, Field(ge=1, le=1_000_000)],
    "ocr_service_recycle_memory": Annotated[int, Field(ge=100, le=1_000_000)],
    "ocr_service_competing_units": list[SystemUnit],
    "ocr_service_api_memory_max": MemoryMax,
    "ocr_service_worker_memory_max": MemoryMax,
}
"""What a variable may hold beyond its type; `path` variables are folders without further ado."""

ORDERED: Final = (
    ("llm_gateway_max_body", "llm_gateway_max_buffered", "a body of that size could never be kept"),
)
"""Pairs of sizes in bytes of which the first may not be the larger one, and why."""

_TYPES: Final[Mapping[str, Any]] = {
    "str": Line,
    "path": Folder,
    "int": int,
    "float": float,
    "bool": bool,
    "dict": dict[str, Any],
    "list": list[Any],
    "raw": Any,
}


@dataclass(frozen=True)
class RoleVariables:
    """Every variable that the roles know."""

    roles: tuple[str, ...]
    known: frozenset[str]
    secret: frozenset[str]
    model: type[BaseModel]
    defaults: Mapping[str, Any]

    @classmethod
    def of(cls, specs: Mapping[str, Mapping[str, Any]]) -> RoleVariables:
        """From each role's meta/argument_specs.yml, parsed, by the role's name."""
        options: dict[str, Mapping[str, Any]] = {}
        for spec in specs.values():
            for entry in spec["argument_specs"].values():
                options |= entry.get("options") or {}
        fields: dict[str, Any] = {
            name: (LIMITS.get(name) or _annotation(option), None)
            for name, option in options.items()
            if name not in OWNED
        }
        model = create_model(
            "RoleVariables", __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False), **fields
        )
        secret = frozenset(name for name, option in options.items() if option.get("no_log"))
        defaults = {name: option["default"] for name, option in options.items() if "default" in option}
        return cls(tuple(specs), frozenset(options) | OWNED, secret, model, defaults)

    def role_of(self, name: str) -> str | None:
        """The role whose variable `name` claims to be."""
        return next((role for role in self.roles if name.startswith(f"{role}_")), None)

    def unknown(self, name: str, value: object) -> Problem | None:
        """The problem of a name that looks like a role's variable and is none."""
        if name in self.known:
            return None
        role = self.role_of(name)
        guess = closest(name, self.known) if role else misspelt(name, self.known)
        if role is None and guess is None:
            return None
        return Problem(
            (name,),
            self._shown(name, "…" if isinstance(value, Mapping | list | tuple) else value),
            f"is no variable of the role {role}" if role else "is no variable of any role here",
            f"did you mean '{guess}'?"
            if guess
            else f"remove it: roles/{role}/meta/argument_specs.yml lists all of them",
        )

    def of_host(self, names: Iterable[str]) -> list[str]:
        """Those of a host's variables that `check` looks at."""
        return [name for name in names if name in self.model.model_fields]

    def check(self, variables: Mapping[str, Any]) -> list[Problem]:
        """Every problem of role variables that are set; the values are plain data."""
        try:
            self.model.model_validate(dict(variables))
        except ValidationError as error:
            return [self._hidden(problem) for problem in problems_of(error, variables, self.model)]
        return list(self._out_of_order(variables))

    def _out_of_order(self, variables: Mapping[str, Any]) -> Iterator[Problem]:
        """What is wrong with two variables together, the one that is left out at its default."""
        values = {**self.defaults, **variables}
        for small, large, reason in ORDERED:
            if small in values and large in values and values[small] > values[large]:
                name, other = (small, large) if small in variables else (large, small)
                than = "more" if name == small else "less"
                yield Problem(
                    (name,),
                    values[name],
                    f"is {than} than {other} ({values[other]} bytes): {reason}",
                    f"lower {small} or raise {large}",
                )

    def _shown(self, name: str, value: object) -> object:
        return HIDDEN if name in self.secret or name.endswith(SECRET_SUFFIXES) else value

    def _hidden(self, problem: Problem) -> Problem:
        """The problem without a secret's value, or that of what should have been a public key."""
        if problem.path[0] == PUBLIC_KEYS:
            return Problem(problem.path, HIDDEN, problem.message, PUBLIC_KEY_FIX)
        if problem.path[0] == ROUTER_KEYS:  # somebody may have written the key itself
            return Problem(problem.path, HIDDEN, problem.message, problem.fix)
        if problem.path[0] == OCR_KEYS and problem.path[-1] != "name":
            return Problem(problem.path, HIDDEN, problem.message, problem.fix)
        if self._shown(problem.path[0], "") == HIDDEN:
            fix = ocr_service.FIXES.get(problem.path[0], "write one line of text, in quotes")
            return Problem(problem.path, HIDDEN, problem.message, fix)
        return problem


def _annotation(option: Mapping[str, Any]) -> Any:
    """The type of one option of an argument specification."""
    if "choices" in option:
        return Literal[tuple(option["choices"])]
    kind = option.get("type", "str")
    item = option.get("elements")
    return GenericAlias(list, (_TYPES[item],)) if kind == "list" and item else _TYPES[kind]
