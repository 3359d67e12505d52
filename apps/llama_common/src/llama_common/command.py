"""The one place where a llama-server command line is composed."""

from __future__ import annotations

from llama_common.dialect import Dialect
from llama_common.draft import SIMPLE, DraftType
from llama_common.fields import Address
from llama_common.flags import is_flag, normalize
from llama_common.presets import Preset
from llama_common.problems import InventoryError, Problem

SOCKET_PORT = 8080
"""--port is given with a socket too: the default has changed before, and binding
asks for a number other than 0."""


def command_line(
    name: str,
    preset: Preset,
    *,
    binary: str,
    model_path: str,
    draft_path: str | None,
    listen: str,
    projector_path: str | None = None,
    dialect: Dialect | None = None,
    draft_type: DraftType | None = None,
) -> list[str]:
    """The argument vector for one preset. A `draft_type` without a path is the model's own head.

    Raises InventoryError when the preset needs something that this binary does not have.
    """
    dialect = dialect or Dialect.from_help(None)
    address = Address.parse(listen)
    command = [
        binary,
        "--model",
        model_path,
        "--alias",
        name,
        "--host",
        address.host,
        "--port",
        str(address.port or SOCKET_PORT),
        "--ctx-size",
        str(preset.context),
        "--parallel",
        str(preset.parallel),
        "--n-gpu-layers",
        str(preset.n_gpu_layers),
        "--cache-type-k",
        preset.kv_cache_type,
        "--cache-type-v",
        preset.kv_cache_type,
    ]
    if projector_path is not None:
        if not dialect.knows("--mmproj"):
            raise _unsupported("--mmproj", name, preset, "projector", "use a newer build, or leave it out")
        command += ["--mmproj", projector_path]
    if preset.threads is not None:
        command += ["--threads", str(preset.threads)]
    if preset.n_cpu_moe:
        if not dialect.knows("--n-cpu-moe"):
            fix = "use a newer build, or write n_cpu_moe: 0"
            raise _unsupported("--n-cpu-moe", name, preset, "n_cpu_moe", fix)
        command += ["--n-cpu-moe", str(preset.n_cpu_moe)]
    command += _flash_attention(preset, dialect)
    # Left on, it would shrink the context to what fits: the server would start with less than promised.
    if dialect.knows("--fit"):
        command += ["--fit", "off"]
    jinja = "--jinja" if preset.jinja else "--no-jinja"
    if dialect.knows(jinja):
        command.append(jinja)
    command += [flag for flag in ("--metrics", "--slots") if dialect.knows(flag)]
    web_page = dialect.first_known("--no-ui", "--no-webui")
    if web_page:
        command.append(web_page)
    # The default reflects any origin: every web page a person opens could then talk to the model.
    if dialect.knows("--cors-origins"):
        command += ["--cors-origins", "localhost"]
    if draft_path is not None or draft_type is not None:
        command += _draft(draft_path, draft_type or SIMPLE, name, preset, dialect)
    _check_extra_args(name, preset, dialect)
    return [*command, *preset.extra_args]


def _flash_attention(preset: Preset, dialect: Dialect) -> list[str]:
    """Older binaries have a switch, newer ones a value."""
    if dialect.values("--flash-attn"):
        return ["--flash-attn", "on" if preset.flash_attention else "off"]
    return ["--flash-attn"] if preset.flash_attention else []


def _draft(path: str | None, kind: DraftType, name: str, preset: Preset, dialect: Dialect) -> list[str]:
    """The draft as this dialect names it."""
    fix = "use a newer build, or write draft: none"
    command = []
    if path is not None:
        model = dialect.first_known("--spec-draft-model", "--model-draft")
        if model is None:
            raise _unsupported("--spec-draft-model", name, preset, "draft", fix)
        layers = dialect.first_known("--spec-draft-ngl", "--n-gpu-layers-draft", "--gpu-layers-draft")
        command = [model, path]
        if layers:
            command += [layers, str(preset.n_gpu_layers)]
    if any(normalize(item) == "--spec-type" for item in preset.extra_args):
        return command
    if dialect.knows_draft(kind):
        return [*command, "--spec-type", kind]
    if kind != SIMPLE:
        raise _unsupported(f"--spec-type {kind}", name, preset, "draft", fix)
    return command


def _check_extra_args(name: str, preset: Preset, dialect: Dialect) -> None:
    """Refuse what this very binary would refuse or misread."""
    if not dialect.complete:
        return
    problems = []
    items = list(preset.extra_args)
    index = 0
    while index < len(items):
        item = items[index]
        path = ("llama_presets", name, "extra_args", str(index))
        flag = normalize(item)
        values = dialect.values(flag)
        index += 1 + values
        if not is_flag(item):
            problems.append(
                Problem(
                    path,
                    item,
                    "is a value without a flag before it",
                    "remove it, or write its flag before it",
                )
            )
        elif flag in dialect.removed:
            problems.append(
                Problem(
                    path,
                    item,
                    f"llama-server of {preset.build}: {dialect.removed[flag]}",
                    "write what it says",
                )
            )
        elif not dialect.knows(flag):
            guess = dialect.closest(flag)
            fix = f"did you mean {guess}?" if guess else "remove it, or use another build"
            problems.append(
                Problem(path, item, f"llama-server of the build {preset.build} does not know {flag}", fix)
            )
        elif len(items) < index or any(
            is_flag(value) and dialect.knows(normalize(value)) for value in items[index - values : index]
        ):
            problems.append(
                Problem(
                    path,
                    item,
                    f"{flag} needs {values} value(s): {dialect.hints[flag]}",
                    "write the value as the next item",
                )
            )
    if problems:
        raise InventoryError(problems)


def _unsupported(flag: str, name: str, preset: Preset, key: str, fix: str) -> InventoryError:
    """The refusal of a key that this binary has no flag for."""
    message = f"llama-server of the build {preset.build} does not know {flag}"
    return InventoryError([Problem(("llama_presets", name, key), getattr(preset, key), message, fix)])
