"""The one llama-server command line: complete, explicit, and in the dialect of the binary."""

from __future__ import annotations

from typing import Any

import pytest
from llama_common.command import command_line
from llama_common.dialect import Dialect
from llama_common.presets import Preset
from llama_common.problems import InventoryError

# The format of `llama-server --help` since its options are declared in common/arg.cpp; texts shortened.
CURRENT_HELP = """\
----- common params -----

-h,    --help, --usage                  print usage and exit
-t,    --threads N                      number of CPU threads to use during generation (default: -1)
                                        (env: LLAMA_ARG_THREADS)
-c,    --ctx-size N                     size of the prompt context
-fa,   --flash-attn [on|off|auto]       set Flash Attention use
                                        - on: always
-ctk,  --cache-type-k TYPE              KV cache data type for K
-ctv,  --cache-type-v TYPE              KV cache data type for V
--mlock                                 keep the model in RAM
-ot,   --override-tensor <tensor name pattern>=<buffer type>,...
                                        override tensor buffer type
-ncmoe, --n-cpu-moe N                   keep the MoE weights of the first N layers in the CPU
-ngl,  --gpu-layers, --n-gpu-layers N   max. number of layers to store in VRAM
-fit,  --fit [on|off]                   whether to adjust unset arguments to fit in device memory
--control-vector-layer-range START END
                                        layer range
-m,    --model FNAME                    model path to load


----- sampling params -----

--temp, --temperature N                 temperature (default: 0.80)


----- speculative params -----

--spec-draft-ngl, -ngld, --gpu-layers-draft, --n-gpu-layers-draft N
                                        max. number of draft model layers to store in VRAM
--spec-draft-model, -md, --model-draft FNAME
                                        draft model for speculative decoding (default: unused)
--spec-type none,draft-simple,draft-mtp,ngram-cache
                                        comma-separated list of types of speculative decoding to use

--spec-draft-n-max N                    number of tokens to draft
--draft, --draft-n, --draft-max N       the argument has been removed. use --spec-draft-n-max or
                                        --spec-ngram-mod-n-max


----- example-specific params -----

-np,   --parallel N                     number of server slots (default: -1, -1 = auto)
-a,    --alias STRING                   set model name aliases
--host HOST                             IP addresses to listen on, or UNIX socket paths ending in .sock
--port PORT                             port to listen
--cors-origins ORIGINS                  comma-separated list of allowed origins for CORS (default: *)
--ui, --webui, --no-ui, --no-webui      whether to enable the Web UI (default: enabled)
--metrics                               enable prometheus compatible metrics endpoint
--slots, --no-slots                     expose slots monitoring endpoint (default: enabled)
--jinja, --no-jinja                     whether to use jinja template engine for chat
"""

OLD_HELP = """\
----- common params -----

-t,    --threads N                      number of threads to use during generation (default: -1)
-c,    --ctx-size N                     size of the prompt context
-fa,   --flash-attn                     enable Flash Attention (default: disabled)
-ctk,  --cache-type-k TYPE              KV cache data type for K
-ctv,  --cache-type-v TYPE              KV cache data type for V
-ngl,  --gpu-layers, --n-gpu-layers N   number of layers to store in VRAM
-m,    --model FNAME                    model path


----- example-specific params -----

-np,   --parallel N                     number of parallel sequences to decode (default: 1)
-a,    --alias STRING                   set alias for model name
--host HOST                             ip address to listen
--port PORT                             port to listen
--no-webui                              Disable the Web UI
--metrics                               enable prometheus compatible metrics endpoint
--slots                                 enable slots monitoring endpoint
--jinja                                 use jinja template for chat
--draft-max, --draft, --draft-n N       number of tokens to draft for speculative decoding (default: 16)
--draft-min, --draft-n-min N            minimum number of draft tokens (default: 0)
-ngld, --gpu-layers-draft, --n-gpu-layers-draft N
                                        number of layers to store in VRAM for the draft model
-md,   --model-draft FNAME              draft model for speculative decoding (default: unused)
"""

CURRENT = Dialect.from_help(CURRENT_HELP)
OLD = Dialect.from_help(OLD_HELP)


def preset(**changes: Any) -> Preset:
    """A preset with a few keys changed."""
    data = {
        "description": "a preset",
        "build": "upstream",
        "model": "m",
        "context": 65536,
        "kv_cache_type": "q8_0",
    }
    return Preset.model_validate({**data, **changes})


def line(
    dialect: Dialect | None,
    listen: str = "127.0.0.1:8090",
    draft: str | None = None,
    projector: str | None = None,
    **changes: Any,
) -> list[str]:
    """The command line of such a preset."""
    return command_line(
        "coder",
        preset(**changes),
        binary="/opt/llama.cpp/upstream/current/bin/llama-server",
        model_path="/m/model.gguf",
        draft_path=draft,
        listen=listen,
        projector_path=projector,
        dialect=dialect,
    )


def value(command: list[str], flag: str) -> str:
    """What follows a flag that is there exactly once."""
    assert command.count(flag) == 1, (flag, command)
    return command[command.index(flag) + 1]


@pytest.mark.parametrize("dialect", [CURRENT, None], ids=["from help", "help unknown"])
def test_everything_that_matters_is_explicit(dialect: Dialect | None) -> None:
    """No default of a binary decides: they have changed before."""
    command = line(dialect, threads=12, n_cpu_moe=16, parallel=2, extra_args=["--mlock"])
    assert command[0] == "/opt/llama.cpp/upstream/current/bin/llama-server"
    assert value(command, "--model") == "/m/model.gguf"
    assert value(command, "--alias") == "coder"
    assert value(command, "--host") == "127.0.0.1"
    assert value(command, "--port") == "8090"
    assert value(command, "--ctx-size") == "65536"
    assert value(command, "--parallel") == "2"
    assert value(command, "--n-gpu-layers") == "99"
    assert value(command, "--n-cpu-moe") == "16"
    assert value(command, "--threads") == "12"
    assert value(command, "--cache-type-k") == value(command, "--cache-type-v") == "q8_0"
    assert value(command, "--flash-attn") == "on"
    assert value(command, "--fit") == "off"
    assert value(command, "--cors-origins") == "localhost"
    assert {"--jinja", "--metrics", "--slots", "--no-ui"} <= set(command)
    assert command[-1] == "--mlock"


def test_what_is_off_is_said_too() -> None:
    """A newer binary has 'auto' where an older one had nothing."""
    command = line(CURRENT, flash_attention=False, kv_cache_type="f16", agent=False, jinja=False)
    assert value(command, "--flash-attn") == "off"
    assert "--no-jinja" in command
    assert "--jinja" not in command
    assert "--n-cpu-moe" not in command
    assert "--threads" not in command


def test_socket_and_ipv6() -> None:
    """A UNIX socket is a host to llama-server, and the port is given all the same."""
    assert value(line(CURRENT, listen="/run/llama/x.sock"), "--host") == "/run/llama/x.sock"
    assert int(value(line(CURRENT, listen="/run/llama/x.sock"), "--port")) > 0
    assert value(line(CURRENT, listen="[::1]:8090"), "--host") == "::1"


def test_an_old_binary_gets_only_what_it_knows() -> None:
    """Flash attention is a switch, --fit and --cors-origins do not exist, the web page has its old name."""
    command = line(OLD, draft="/m/draft.gguf", extra_args=["--draft-max", "16"])
    assert {word for word in command if word.startswith("-")} <= set(OLD.hints)
    assert command[command.index("--flash-attn") + 1].startswith("--")
    assert "--no-webui" in command
    assert value(command, "--model-draft") == "/m/draft.gguf"
    assert value(command, "--n-gpu-layers-draft") == "99"
    assert "--spec-type" not in command
    assert "--flash-attn" not in line(OLD, flash_attention=False, kv_cache_type="f16")


def test_a_projector_is_named_to_a_binary_that_knows_it() -> None:
    known = Dialect.from_help(CURRENT_HELP + "-mm,   --mmproj FILE                    path to a projector\n")
    assert value(line(known, projector="/m/p.gguf"), "--mmproj") == "/m/p.gguf"
    with pytest.raises(InventoryError, match=r"does not know --mmproj; fix: use a newer build"):
        line(CURRENT, projector="/m/p.gguf")


def test_a_draft_model_in_the_current_dialect() -> None:
    """The method is named, unless extra_args name another one."""
    command = line(CURRENT, draft="/m/draft.gguf")
    assert value(command, "--spec-draft-model") == "/m/draft.gguf"
    assert value(command, "--spec-draft-ngl") == "99"
    assert value(command, "--spec-type") == "draft-simple"
    other = line(CURRENT, draft="/m/draft.gguf", extra_args=["--spec-type", "draft-mtp"])
    assert value(other, "--spec-type") == "draft-mtp"


def test_what_a_binary_lacks_is_refused() -> None:
    """A preset is not quietly run without what it asks for."""
    with pytest.raises(InventoryError, match=r"n_cpu_moe = 8: .*upstream does not know --n-cpu-moe; fix: "):
        line(OLD, n_cpu_moe=8)
    no_draft = Dialect.from_help("-m, --model FNAME   model\n")
    with pytest.raises(InventoryError, match=r"draft = .*upstream does not know --spec-draft-model"):
        line(no_draft, draft="/m/d.gguf")


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (["--tmep", "0.2"], "does not know --tmep; fix: did you mean --temp"),
        (["--draft-max", "16"], "the argument has been removed. use --spec-draft-n-max"),
        (["--temp"], "--temp needs 1 value"),
        (["--temp", "--mlock"], "--temp needs 1 value"),
        (["--mlock", "yes"], "a value without a flag before it"),
        (["--control-vector-layer-range", "1"], "needs 2 value"),
    ],
)
def test_extra_arguments_are_held_against_the_binary(items: list[str], says: str) -> None:
    """A binary that would refuse or misread an argument is not started with it."""
    with pytest.raises(InventoryError) as caught:
        line(CURRENT, extra_args=items)
    assert says in str(caught.value)
    assert caught.value.problems[0].path[:3] == ("llama_presets", "coder", "extra_args")


def test_good_extra_arguments_pass() -> None:
    """Values that look like flags, underscores, two values, repeated flags."""
    items = [
        "--temp",
        "-1",
        "--mlock",
        "--control-vector-layer-range",
        "1",
        "9",
        "-ot",
        "a=CPU",
        "-ot",
        "b=CPU",
    ]
    assert line(CURRENT, extra_args=items)[-len(items) :] == items
    line(CURRENT, extra_args=["--spec_draft_n_max", "8"])


def test_extra_arguments_are_not_judged_without_help() -> None:
    """Before the first build nobody knows the flags: that check waits for the binary."""
    assert line(None, extra_args=["--quite-new", "1"])[-2:] == ["--quite-new", "1"]
