"""The data model on sound data, and everything derived from it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from llama_common import derive
from llama_common.fields import OWNED_CMAKE_OPTIONS, Address
from llama_common.plain import plain
from llama_common.presets import HostConfig
from llama_common.problems import MISSING, InventoryError, Problem, show
from llama_common.tables import preset_table

from tests.support import ROOT
from tests.unit import broken_inventories as broken
from tests.unit.test_validate_data import variables


@pytest.fixture
def config() -> HostConfig:
    """The LLM box of the sound inventory."""
    return HostConfig.load(variables(broken.inventory(), "box"))


def plan(config: HostConfig, **arguments: Any) -> dict[str, dict[str, Any]]:
    """The presets as a role derives them."""
    return derive.presets_plan(config, models_dir="/home/llm/models/gguf", **arguments)


def test_builds(config: HostConfig) -> None:
    """The lock is merged in; options are the words that CMake takes."""
    assert derive.builds_plan(config) == {
        "upstream": {
            "repo": "https://git.example/llama.cpp.git",
            "commit": broken.COMMIT,
            "cmake_options": {"CMAKE_CUDA_ARCHITECTURES": "89;120", "GGML_CUDA": "ON"},
        },
        "fork": {"repo": "https://git.example/fork.git", "commit": broken.COMMIT, "cmake_options": {}},
    }


def test_models(config: HostConfig) -> None:
    """Every source, and which preset uses what."""
    models = {model["name"]: model for model in derive.models_plan(config)}
    assert list(models) == list(config.gguf_models)
    assert {name: model["used_by"] for name, model in models.items()} == {
        "qwen-coder-q4": ["coder"],
        "qwen-draft-q8": ["coder"],
        "gemma-q4": ["gemma"],
        "split-q4": ["chat"],
    }
    assert models["qwen-coder-q4"]["files"] == [
        {
            "file": "Qwen-Coder-Q4_K_M.gguf",
            "url": "https://models.example/Qwen-Coder-Q4_K_M.gguf",
            "path": None,
            "sha256": broken.SHA_A,
            "size": 18_556_686_752,
        }
    ]
    assert models["qwen-draft-q8"]["files"][0]["path"] == "/srv/models/qwen-draft-q8.gguf"
    assert models["gemma-q4"]["files"] == [
        {
            "file": "gemma-Q4_K_M.gguf",
            "url": f"https://huggingface.co/someone/gemma-GGUF/resolve/{broken.COMMIT}/gemma-Q4_K_M.gguf",
            "path": None,
            "sha256": broken.SHA_C,
            "size": 17_000_000_000,
        }
    ]
    assert [file["file"] for file in models["split-q4"]["files"]] == [
        "split-00001-of-00002.gguf",
        "split-00002-of-00002.gguf",
    ]


def test_presets(config: HostConfig) -> None:
    """Paths, units and places of every preset; a split model is opened by its first part."""
    presets = plan(config)
    coder = presets["coder"]
    assert coder["unit"] == "llama-coder.service"
    assert coder["command"][0] == "/opt/llama.cpp/upstream/current/bin/llama-server"
    assert coder["model_path"] == "/home/llm/models/gguf/Qwen-Coder-Q4_K_M.gguf"
    assert coder["draft_path"] == "/home/llm/models/gguf/qwen-draft-q8.gguf"
    assert coder["command"][coder["command"].index("--spec-draft-model") + 1] == coder["draft_path"]
    assert coder["listen"] == "/run/user/1500/llama/server.sock"
    assert coder["health_url"] == "unix:///run/user/1500/llama/server.sock"
    assert coder["commit"] == broken.COMMIT
    assert coder["expect"]["generation_tok_s"] == {"target": 81.5, "floor": 55.0}
    assert presets["chat"]["model_path"].endswith("/split-00001-of-00002.gguf")
    assert presets["chat"]["context_per_slot"] == 4096
    assert presets["gemma"]["draft_path"] is None
    assert plan(config, releases_root="/srv")["gemma"]["command"][0] == "/srv/fork/current/bin/llama-server"


def test_relations_of_exclusive_presets(config: HostConfig) -> None:
    """Each conflicts with all others and the foreign unit; of two, exactly one is ordered after the other."""
    presets = plan(config)
    units = {entry["unit"] for entry in presets.values()}
    for entry in presets.values():
        assert set(entry["conflicts"]) == units - {entry["unit"]} | {"lmstudio.service"}
        assert set(entry["after"]) <= set(entry["conflicts"])
    for one in presets.values():
        for other in presets.values():
            if one is not other:
                assert (other["unit"] in one["after"]) != (one["unit"] in other["after"])
        assert "lmstudio.service" in one["after"]


def test_a_system_preset_stands_alone() -> None:
    """The vision server has its own place and conflicts with nothing."""
    ocr = HostConfig.load(variables(broken.inventory(), "ocr-box"))
    vision = plan(ocr, listen="/run/llama/front.sock")["vision"]
    assert (vision["listen"], vision["health_url"]) == ("127.0.0.1:8090", "http://127.0.0.1:8090")
    assert vision["conflicts"] == vision["after"] == []


def test_a_projector_is_installed_and_named_with_its_model() -> None:
    """It is a file like any other: downloaded, verified, watched for drift."""
    data = variables(broken.inventory(), "ocr-box")
    data["llama_presets"]["vision"]["projector"] = "qwen-draft-q8"
    ocr = HostConfig.load(data)
    vision = plan(ocr)["vision"]
    path = "/home/llm/models/gguf/qwen-draft-q8.gguf"
    assert vision["command"][vision["command"].index("--mmproj") + 1] == path
    assert vision["model_files"][-1] == path
    assert vision["draft_path"] is None
    assert {model["name"] for model in derive.models_plan(ocr) if "vision" in model["used_by"]} == {
        vision["model"],
        "qwen-draft-q8",
    }


def test_one_variable_moves_every_user_preset(config: HostConfig) -> None:
    """Where presets listen is one fact."""
    moved = plan(config, listen="/run/user/1500/llama.sock")
    assert {entry["listen"] for entry in moved.values()} == {"/run/user/1500/llama.sock"}
    assert {entry["health_url"] for entry in moved.values()} == {"unix:///run/user/1500/llama.sock"}
    data = {**variables(broken.inventory(), "box"), "llama_presets_listen": "/run/l.sock"}
    assert {entry["health_url"] for entry in plan(HostConfig.load(data)).values()} == {"unix:///run/l.sock"}


def test_the_roles_defaults_are_the_model_s() -> None:
    """What holds when nothing says so."""
    defaults: dict[str, Any] = {}
    for role in ("llm_user", "llama_presets", "llm_gateway"):
        defaults |= yaml.safe_load((ROOT / f"roles/{role}/defaults/main.yml").read_text(encoding="utf-8"))
    listen = defaults["llama_presets_listen"].replace("{{ llm_user_uid }}", str(defaults["llm_user_uid"]))
    empty = HostConfig.load({}).model_dump()
    data = {"llama_cpp_builds", "gguf_models", "llama_presets", "llama_lock", "llama_drafts"}
    assert {**defaults, "llama_presets_listen": listen}.items() >= {
        name: value for name, value in empty.items() if name not in data
    }.items()


def test_options_that_the_build_role_sets_cannot_be_data() -> None:
    """What the role owns is refused in cmake_options."""
    internal = yaml.safe_load((ROOT / "roles/llama_cpp/vars/main.yml").read_text(encoding="utf-8"))
    assert set(internal["_llama_cpp_owned_options"]) <= set(OWNED_CMAKE_OPTIONS)


def test_a_new_preset_is_one_entry() -> None:
    """Nothing but the entry is needed for unit, relations and table."""
    files = broken.inventory()
    broken.put("llama_presets.extra", {**files["presets"]["llama_presets"]["gemma"], "aliases": ["e"]})(files)
    config = HostConfig.load(variables(files, "box"))
    presets = plan(config)
    assert presets["extra"]["unit"] == "llama-extra.service"
    assert all(
        "llama-extra.service" in entry["conflicts"] for name, entry in presets.items() if name != "extra"
    )
    assert "| `extra` | `e` |" in preset_table(config)


def test_the_table(config: HostConfig) -> None:
    """One row per preset, every row as wide as the heading, nothing that breaks Markdown."""
    rows = preset_table(config).splitlines()
    assert len(rows) == 2 + len(config.llama_presets)
    assert {row.replace("\\|", "").count("|") for row in rows} == {rows[0].count("|")}
    assert "81.5 tok/s, at least 55" in rows[2]
    assert "16384 tokens in 4 slots" in rows[4]
    data = variables(broken.inventory(), "box")
    data["llama_presets"]["chat"]["description"] = "a | b"
    assert "a \\| b" in preset_table(HostConfig.load(data))


def test_left_out_variables_are_empty() -> None:
    """A host without presets needs none of the variables."""
    empty = HostConfig.load({})
    assert (plan(empty), derive.models_plan(empty), derive.builds_plan(empty)) == ({}, [], {})
    assert preset_table(empty).count("\n") == 2
    assert HostConfig.load({"llama_lock": None}) == empty


def test_draft_auto_is_no_draft_until_one_is_chosen() -> None:
    """Choosing takes a measurement."""
    files = broken.inventory()
    broken.preset("draft", "auto")(files)
    assert plan(HostConfig.load(variables(files, "box")))["coder"]["draft_path"] is None


def test_every_problem_is_reported() -> None:
    """One run names everything of a stage, the first one in the message."""
    files = broken.inventory()
    broken.preset("threads", 0)(files)
    broken.put("llama_presets.gemma.contxt", 1)(files)
    with pytest.raises(InventoryError) as caught:
        HostConfig.load(variables(files, "box"))
    assert len(caught.value.problems) == 2
    assert str(caught.value).endswith("(+1 more)")
    assert str(caught.value).startswith("refused: inventory: llama_presets.coder.threads = 0: ")


def test_tagged_values_become_plain() -> None:
    """Subclasses of str and int, as Ansible passes them, do not reach the model."""

    class Text(str):
        __slots__ = ()

    class Number(int):
        pass

    made = plain({Text("a"): [Text("b"), Number(3), True, None, 1.5]})
    assert made == {"a": ["b", 3, True, None, 1.5]}
    assert [type(item) for item in made["a"]] == [str, int, bool, type(None), float]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (MISSING, "(missing)"),
        (None, "null"),
        (True, "true"),
        (["a", 1], '["a", 1]'),
        ("a\nb\x1b\u2028", '"a\\nb\\u001b\\u2028"'),
        ("https://me:pw@host/x?token=abc&y=1", '"https://***@host/x?token=***&y=1"'),
        ("hf_abcdefghijklmnop", '"hf_***"'),
        ("x" * 200, '"' + "x" * 70 + "…"),
    ],
)
def test_values_are_shown_safely(value: object, shown: str) -> None:
    """Short, on one line, without secrets."""
    assert show(value) == shown


def test_a_line_stays_one_line() -> None:
    """Even keys and messages cannot break it."""
    line = Problem(("a\nb",), "x", "bad\r\nthing", "do\x00this").line("file\n.yml")
    assert line.isprintable()
    assert line.startswith("refused: file\\u000a.yml: a\\u000ab = ")


@pytest.mark.parametrize(
    ("one", "other", "clash"),
    [
        ("127.0.0.1:80", "127.0.0.1:80", True),
        ("127.0.0.1:80", "0.0.0.0:80", True),
        ("[::]:80", "127.0.0.1:80", True),
        ("127.0.0.1:80", "127.0.0.2:80", False),
        ("127.0.0.1:80", "127.0.0.1:81", False),
        ("/run/a.sock", "/run/a.sock", True),
        ("/run/a.sock", "/run/b.sock", False),
        ("/run/a.sock", "0.0.0.0:80", False),
    ],
)
def test_which_addresses_clash(one: str, other: str, clash: bool) -> None:
    """Two listeners on one port clash when an address covers the other."""
    assert Address.parse(one).clashes_with(Address.parse(other)) is clash
    assert Address.parse(other).clashes_with(Address.parse(one)) is clash
