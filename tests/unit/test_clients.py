"""What a client machine is told, on Linux and on a Mac, and how its files are changed and come back."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from llama_common import clients
from llama_common.clients import Box
from llama_common.presets import HostConfig
from local_claude import llama, options

from plugins.filter.clients import client_files, client_hosts
from roles.local_claude.library import local_claude_files as module
from tests.support import ROOT

# Written by hand in the form of Ansible's setup module; no Mac was at hand.
MAC = {"system": "Darwin", "user_dir": "/Users/you", "user_shell": "/bin/zsh", "machine": "arm64"}
LINUX = {"system": "Linux", "user_dir": "/home/you", "user_shell": "/bin/bash", "machine": "x86_64"}
DEFAULTS = yaml.safe_load((ROOT / "roles/local_claude/defaults/main.yml").read_text())


def preset(**more: Any) -> dict[str, Any]:
    return {
        "description": "one",
        "build": "b",
        "model": "m",
        "context": 98304,
        "kv_cache_type": "q8_0",
        **more,
    }


DATA: dict[str, Any] = {
    "llama_cpp_builds": {"b": {"repo": "https://git.example/x", "commit": "0" * 40}},
    "gguf_models": {"m": {"url": "https://models.example/m.gguf", "sha256": "0" * 64, "size": 1}},
    "llama_presets": {
        "coder": preset(aliases=["c"], parallel=2),
        "qwen36": preset(aliases=["q", "q36"], context=40960),
        "small": preset(agent=False, context=4096),
        "vision": preset(scope="system", listen="127.0.0.1:8090", agent=False),
    },
    "llm_gateway_listen": ["127.0.0.1:1234", "100.64.0.10:1234"],
}
HOSTVARS = {
    "ancalagon": {"ansible_host": "100.64.0.10", "llm_user_name": "llm", **DATA},
    "ocr-box": {"ansible_port": 2222, "llama_presets": {}},
}


def files(facts: dict[str, str], **options: Any) -> dict[str, dict[str, Any]]:
    """Every file for a client, by its path."""
    wanted = {
        "servers": ["ancalagon"],
        **{
            name.removeprefix("local_claude_"): value
            for name, value in DEFAULTS.items()
            if "servers" not in name
        },
        **options,
    }
    found = client_files(client_hosts(list(HOSTVARS), HOSTVARS), facts, wanted)
    return {(entry.get("paths") or [entry["path"]])[-1]: entry for entry in found}


def box(name: str = "ancalagon", **more: Any) -> Box:
    return Box.of(name, HOSTVARS["ancalagon"], HostConfig.load({**DATA, **more}), "llm")


def test_aliases_come_from_the_presets() -> None:
    found = clients.aliases([box()], "/home/you/.local/bin/local-claude")
    names = "llcoder llc llqwen36 llq llq36 llsmall lloff llsleep llstatus lllogs srl-coder srl-qwen36"
    assert list(found) == names.split()
    assert found["llq36"] == "ssh llm@ancalagon lmswitch qwen36"
    assert shlex.split(found["srl-coder"])[:4] == ["specstory", "run", "claude", "-c"]
    told = "/home/you/.local/bin/local-claude --host 100.64.0.10 --port 1234 --model coder"
    assert shlex.split(found["srl-coder"])[4] == told


def as_specstory_splits(command: str) -> list[str]:
    """The words of `specstory run claude -c`: by its own rule, which knows no shell (pkg/spi/cmdline.go)."""
    words: list[str] = []
    word, quote, escaped = "", "", False
    for one in f"{command} ":
        if escaped:
            word, escaped = word + one, False
        elif one == "\\":
            escaped = True
        elif quote:
            word, quote = (word, "") if one == quote else (word + one, quote)
        elif one in "'\"":
            quote = one
        elif one in " \t\n":
            words, word = ([*words, word] if word else words), ""
        else:
            word += one
    return words


@pytest.mark.parametrize(
    "tool", ["/home/you/.local/bin/local-claude", "/Users/with blank's/bin/local-claude"]
)
def test_specstory_gets_the_words_that_a_shell_would(tool: str) -> None:
    command = shlex.split(clients.aliases([box()], tool)["srl-coder"])[4]
    assert as_specstory_splits(command) == shlex.split(command)
    assert as_specstory_splits(command)[0] == tool


def test_a_second_box_has_its_name_in_its_aliases() -> None:
    found = clients.aliases([box(), box("smaug")], "local-claude")
    assert found["llcoder-smaug"] == "ssh llm@smaug lmswitch coder"
    assert found["llcoder"] == "ssh llm@ancalagon lmswitch coder"
    assert len(found) == 24


@pytest.mark.parametrize("home", ["/home/you", "/Users/with blank's/you"])
def test_a_shell_reads_them(home: str, tmp_path: Path) -> None:
    entries = clients.aliases([box()], f"{home}/.local/bin/local-claude")
    text = clients.shell_text(entries, f"{home}/.local/bin")
    (tmp_path / "shell.sh").write_text(text)
    script = f'. {tmp_path}/shell.sh; . {tmp_path}/shell.sh; alias srl-coder; echo "$PATH"'
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env={"PATH": "/bin"},
    )
    line, path = done.stdout.splitlines()
    assert shlex.split(line)[1] == f"srl-coder={entries['srl-coder']}"
    assert path == f"{home}/.local/bin:/bin"


def test_the_gateway_is_where_other_machines_reach_it() -> None:
    assert box().url == "http://100.64.0.10:1234"
    assert box(llm_gateway_listen=["0.0.0.0:4000"]).gateway == ("100.64.0.10", 4000)
    assert box(llm_gateway_listen=["[fd00::1]:4000"]).url == "http://[fd00::1]:4000"


def test_ssh_knows_the_boxes_and_leaves_the_login_to_the_person() -> None:
    text = files(LINUX)["/home/you/.config/llmbox/ssh_config"]["text"]
    assert text.splitlines()[1:] == [
        *("Host ancalagon", "  HostName 100.64.0.10"),
        *("Host ocr-box", "  HostName ocr-box", "  Port 2222"),
    ]


def test_opencode_is_told_the_context_of_a_request() -> None:
    found = clients.opencode_providers([box()])["llmbox-ancalagon"]
    assert found["models"]["coder"]["limit"] == {"context": 49152, "output": 6144}
    assert found["options"] == {"baseURL": "http://100.64.0.10:1234/v1"}
    keyed = box(llm_gateway_keys=[{"name": "laptop", "sha256": "1" * 64}])
    assert clients.opencode_providers([keyed])["llmbox-ancalagon"]["options"]["apiKey"] == "{env:LLMBOX_KEY}"


@pytest.mark.parametrize("facts", [LINUX, MAC], ids=["linux", "mac"])
def test_local_claude_starts_what_the_role_wrote(
    facts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = llama.PRESETS[0].replace("~", facts["user_dir"])
    for words in ("--preset qwen36", "--model qwen36", "--model m"):
        plan = planned(files(facts)[place]["text"], words, tmp_path, monkeypatch)
        name = "coder" if words.endswith(" m") else "qwen36"  # several presets of one file: the first
        assert (plan.alias, plan.model) == (name, "/m/m.gguf")
        assert plan.preset == box().presets[name].model_copy(update=NOT_ITS)


NOT_ITS = {"build": "local", "model": "local", "aliases": []}


def planned(written: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> llama.Plan:
    """What `local-claude --backend llama` starts, from the presets that the role wrote."""
    (folder / "presets.json").write_text(written)
    monkeypatch.setattr(llama, "PRESETS", (str(folder / "presets.json"),))
    header = {"general.architecture": "llama", "llama.context_length": 262144}
    there = [{"path": f"/m/{name}.gguf", "size": 1, "values": header, "lengths": {}} for name in ("m", "n")]
    found = {"program": "/bin/llama-server", "help": "", "files": there}
    return llama.plan(found, options.parse(["--backend", "llama", *words.split()]), lambda _: None)


@pytest.mark.parametrize(
    "said",
    [
        {"description": "two"},
        {"context": 65536},
        {"kv_cache_type": "q4_0"},
        {"n_gpu_layers": 20},
        {"n_cpu_moe": 16},
        {"threads": 4},
        {"flash_attention": False, "kv_cache_type": "f16"},
        {"parallel": 2},
        {"agent": False},
        {"jinja": False, "agent": False},
        {"extra_args": ["--mlock"]},
    ],
    ids=" ".join,
)
def test_every_word_of_a_preset_about_its_server_reaches_local_claude(
    said: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = box(llama_presets={"own": preset(**said)})
    written = json.dumps(clients.local_presets([own]))
    plan = planned(written, "--preset own", tmp_path, monkeypatch)
    assert plan.preset == own.presets["own"].model_copy(update=NOT_ITS)
    assert all(getattr(plan.preset, name) == value for name, value in said.items())


def test_of_two_boxes_with_one_preset_the_first_counts() -> None:
    other = {**DATA["llama_presets"], "coder": preset(context=65536), "more": preset()}
    made = clients.local_presets([box(), box("smaug", llama_presets=other)])["presets"]
    assert made["coder"]["context"] == 98304 and "more" in made and "vision" not in made


def test_files_of_a_mac_and_of_linux() -> None:
    mac, linux = files(MAC), files(LINUX)
    assert "/Users/you/Library/Application Support/Code/User/settings.json" in mac
    assert "/home/you/.config/Code/User/settings.json" in linux
    profile = mac["/Users/you/.bash_profile"]
    assert [path.rpartition("/")[2] for path in profile["paths"][:3]] == [
        ".bash_profile",
        ".bash_login",
        ".profile",
    ]
    assert [mac["/Users/you/.zshrc"]["make"], profile["make"]] == [True, False]
    assert [linux["/home/you/.zshrc"]["make"], linux["/home/you/.bashrc"]["make"]] == [False, True]
    assert "/Users/you/.local/bin/local-claude" in mac["/Users/you/.config/llmbox/shell.sh"]["text"]


def test_vs_code_gets_what_local_claude_would_set() -> None:
    entry = files(MAC, vscode=True)["/Users/you/Library/Application Support/Code/User/settings.json"]
    found = {item["name"]: item["value"] for item in entry["content"]}
    assert found["ANTHROPIC_BASE_URL"] == "http://100.64.0.10:1234"
    assert found["CLAUDE_CONFIG_DIR"] == "/Users/you/.claude-local"
    assert (found["ANTHROPIC_MODEL"], found["CLAUDE_CODE_MAX_CONTEXT_TOKENS"]) == ("coder", "49152")
    assert found["ANTHROPIC_AUTH_TOKEN"]
    assert entry["wanted"] and not files(MAC)[entry["path"]]["wanted"]


def test_vs_code_takes_the_person_s_key_of_a_box_that_wants_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A placeholder in the settings would stand before the key of the environment."""
    keys = [{"name": "laptop", "sha256": "1" * 64}]
    monkeypatch.setitem(HOSTVARS, "ancalagon", {**HOSTVARS["ancalagon"], "llm_gateway_keys": keys})
    entry = files(MAC, vscode=True)["/Users/you/Library/Application Support/Code/User/settings.json"]
    assert "ANTHROPIC_AUTH_TOKEN" not in {item["name"] for item in entry["content"]}


@pytest.mark.parametrize(
    ("variables", "refused"),
    [
        ({"local_claude_servers": ["ancalagon", "smaug"]}, "local_claude_servers.1"),
        ({"local_claude_model": "vision2"}, "local_claude_model"),
        ({"local_claude_model": "coder", "local_claude_servers": []}, "local_claude_model"),
        ({"local_claude_model": "coder", "local_claude_servers": ["ancalagon"]}, None),
        ({"local_claude_model": "coder"}, None),
        ({}, None),
    ],
)
def test_a_client_names_boxes_and_presets_that_there_are(
    variables: dict[str, Any], refused: str | None
) -> None:
    found = clients.client_problems(variables, {"ancalagon": ["coder"]})
    assert [problem.key for problem in found] == ([refused] if refused else [])


# --- the files ---

BEGIN_LINE = "# BEGIN llmbox"

TEXTS = {
    "empty": "",
    "no line break at the end": "export A=1",
    "ordinary": "# mine\nalias ll='ls -l'\n",
    "crlf": "a\r\nb\r\n",
}
JSONS = {
    "empty object": "{}",
    "nothing but a comment": "{\n  // mine\n}\n",
    "members": '{\n    "a": 1, // one, "x": {\n    "b": [1, 2,], /* } */\n}\n',
    "one line": '{"editor.fontSize": 12}',
    "ours beside theirs": '{"at": [ // theirs\n {"name": "HTTP_PROXY", "value": "http://x/"} ], "b": "\\"]"}',
    "an empty list": '{"a": {"at": 1}, "at": []}',
    "crlf": '{\r\n\t"a": true\r\n}\r\n',
    "tabs, bom": '\ufeff{\n\t"a": null\n}',
}
ITEMS = [{"name": "ANTHROPIC_BASE_URL", "value": 'http://h//x "q"'}, {"name": "B", "value": ""}]


def plain_json(text: str) -> Any:
    """JSON with comments, as an editor understands it."""
    token = re.compile(r'("(?:[^"\\]|\\.)*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
    bare = token.sub(lambda found: found[1] or "", text.removeprefix("\ufeff"))
    return json.loads(re.sub(r",(\s*[\]}])", r"\1", bare))


def converge(entry: dict[str, Any]) -> bool:
    """What the module does with one entry; whether it changed something."""
    change = module.planned(entry)
    if change.before != change.after:
        module.apply(change)
    return change.before != change.after


@pytest.mark.parametrize("name", TEXTS)
def test_lines_come_first_and_go_without_a_trace(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rc"
    path.write_bytes(TEXTS[name].encode())
    path.chmod(0o640)
    entry = {"paths": [str(path)], "kind": "block", "text": "ours", "make": False, "wanted": True}
    assert converge(entry) and not converge(entry)
    assert path.read_bytes().decode().splitlines()[1] == "ours"
    assert path.read_bytes().endswith(TEXTS[name].encode())
    assert converge({**entry, "text": "other"}) and not converge({**entry, "text": "other"})
    path.write_bytes(path.read_bytes() + b"\nlater")
    assert converge({**entry, "wanted": False}) and not converge({**entry, "wanted": False})
    assert path.read_bytes() == TEXTS[name].encode() + b"\nlater"
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", JSONS)
@pytest.mark.parametrize("content", [ITEMS, {"ours": {"deep": [1, "x"]}}])
def test_json_is_added_to_and_comes_back_byte_for_byte(name: str, content: Any, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(JSONS[name].encode())
    key = "at" if isinstance(content, list) else "own"
    entry = {"path": str(path), "kind": "json", "at": [key], "content": content, "wanted": True}
    assert converge(entry) and not converge(entry)
    before, after = plain_json(JSONS[name]), plain_json(path.read_bytes().decode())
    theirs = before.get(key, type(content)())
    assert after[key] == (content + theirs if isinstance(content, list) else {**content, **theirs})
    assert {**after, key: 0} == {**before, key: 0}
    assert converge({**entry, "wanted": False}) and not converge({**entry, "wanted": False})
    assert path.read_bytes() == JSONS[name].encode()


def test_an_editor_s_line_breaks_are_cut_out_with_the_block(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text('{\n  "a": 1\n}\n')
    entry = {"path": str(path), "kind": "json", "at": ["at"], "content": ITEMS, "wanted": True}
    converge(entry)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    converge({**entry, "wanted": False})
    assert path.read_bytes() == b'{\r\n  "a": 1\r\n}\r\n'


def behind_the_last(text: str, more: str) -> str:
    """A new setting where VS Code puts it: directly behind the last member, so before END."""
    end = text.rindex("\n  /* END llmbox */")
    return f"{text[:end].removesuffix(',')},\n  {more}{text[end:]}"


@pytest.mark.parametrize("theirs", [None, "{}\n", '{\n  // mine\n  "a": [1]\n}\n'])
@pytest.mark.parametrize("content", [ITEMS, {"llmbox-one": {"deep": [1]}}])
def test_a_setting_that_an_editor_put_into_our_block_stays(
    content: Any, theirs: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "settings.json"
    if theirs is not None:
        path.write_text(theirs)
    entry = {"path": str(path), "kind": "json", "at": ["at"], "content": content, "wanted": True}
    converge(entry)
    made = behind_the_last(path.read_text(), '// mine too\n  "editor.fontSize": 17')
    path.write_text(made if theirs is None or "a" not in theirs else made.replace("17\n", "17,\n"))
    before = plain_json(path.read_text())
    assert before["editor.fontSize"] == 17
    edited = path.read_text()

    assert converge(entry) and not converge(entry)
    assert plain_json(path.read_text()) == before
    assert path.read_text().index("END llmbox") < path.read_text().index("// mine too")
    without_ours = {name: value for name, value in before.items() if name != "at"}
    for text in (path.read_text(), edited):  # whether a run came between or not
        path.write_text(text)
        assert converge({**entry, "wanted": False})
        assert plain_json(path.read_text()) == without_ours and "// mine too" in path.read_text()


@pytest.mark.parametrize(
    ("content", "more"),
    [(ITEMS, {"name": "MINE", "value": "1"}), ({"llmbox-one": {}}, {"mine": {"deep": [1]}})],
)
def test_what_was_put_beside_ours_in_a_list_that_we_made_stays(
    content: Any, more: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "settings.json"
    path.write_text("{}")
    entry = {"path": str(path), "kind": "json", "at": ["at"], "content": content, "wanted": True}
    converge(entry)
    listed = isinstance(content, list)
    inside = json.dumps(more) if listed else json.dumps(more)[1:-1]
    text = path.read_text()
    closing = text.rindex("]" if listed else "}", 0, text.index("/* END"))
    path.write_text(f"{text[:closing].rstrip()},\n    {inside}\n  {text[closing:]}")
    both = [*content, more] if listed else {**content, **more}
    assert converge(entry) and not converge(entry)
    assert plain_json(path.read_text()) == {"at": both}
    converge({**entry, "wanted": False})
    assert plain_json(path.read_text()) == {"at": [more] if listed else more}


def test_what_was_ours_and_is_not_any_more_goes(tmp_path: Path) -> None:
    """A box of another name: the old one's entry is no setting of the person."""
    path = tmp_path / "settings.json"
    entry = {
        "path": str(path),
        "kind": "json",
        "at": ["at"],
        "content": {"old": 1, "both": 2},
        "wanted": True,
    }
    converge(entry)
    converge({**entry, "content": {"both": 3, "new": 4}})
    assert plain_json(path.read_text()) == {"at": {"both": 3, "new": 4}}
    converge({**entry, "content": {"other": 5}, "wanted": False})
    assert not path.exists()


OURS = "# Managed by llmbox\n"


@pytest.mark.parametrize("kind", ["block", "json", "own"])
def test_what_was_made_goes_with_its_folders(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "one/file"
    (tmp_path / "one").mkdir() if kind == "own" else None
    entry = {"paths": [str(path)], "kind": kind, "text": OURS, "at": ["at"], "content": ITEMS, "make": True}
    assert converge({**entry, "wanted": True}) and path.is_file()
    assert not converge({**entry, "wanted": True})
    assert converge({**entry, "wanted": False})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_somebody_else_uses_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "one/two/file"
    entry = {"path": str(path), "kind": "json", "at": ["at"], "content": ITEMS, "wanted": True}
    converge(entry)
    (tmp_path / "one/theirs").touch()
    assert converge({**entry, "wanted": False})
    assert [one.name for one in (tmp_path / "one").iterdir()] == ["theirs"]


def test_what_the_person_wrote_into_a_file_of_ours_stays(tmp_path: Path) -> None:
    path = tmp_path / "rc"
    entry = {"paths": [str(path)], "kind": "block", "text": "x", "make": True, "wanted": True}
    converge(entry)
    path.write_text(path.read_text() + "mine\n")
    converge({**entry, "wanted": False})
    assert path.read_text() == "mine\n"


def test_a_start_file_is_made_only_where_it_is_read(tmp_path: Path) -> None:
    entry = {"paths": [str(tmp_path / "rc")], "kind": "block", "text": "x", "make": False, "wanted": True}
    assert not converge(entry)


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "dotfiles").write_text("mine\n")
    (tmp_path / "rc").symlink_to("dotfiles")
    entry = {"paths": [str(tmp_path / "rc")], "kind": "block", "text": "x", "make": True, "wanted": True}
    converge(entry)
    assert (tmp_path / "rc").is_symlink()
    assert (tmp_path / "dotfiles").read_text().endswith("mine\n")
    assert (tmp_path / "dotfiles").read_text().startswith("# BEGIN llmbox")


@pytest.mark.parametrize("kind", ["block", "own"])
def test_a_link_to_nothing_stays_and_what_was_made_behind_it_goes(kind: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    link = tmp_path / "home/rc"
    link.symlink_to(tmp_path / "dot/rc")
    entry = {"paths": [str(link)], "kind": kind, "text": OURS, "make": True, "wanted": True}
    assert converge(entry) and not converge(entry)
    assert (tmp_path / "dot/rc").is_file()
    assert converge({**entry, "wanted": False})
    assert link.is_symlink() and not (tmp_path / "dot").exists()


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "rc"
    link.symlink_to(link)
    entry = {"paths": [str(link)], "kind": "block", "text": "x", "make": True, "wanted": True}
    with pytest.raises(module.Refused, match="leads back to itself; fix: remove it"):
        module.planned(entry)


def test_a_hard_link_stays_one(tmp_path: Path) -> None:
    path, other = tmp_path / "rc", tmp_path / "other"
    path.write_text("mine\n")
    other.hardlink_to(path)
    entry = {"paths": [str(path)], "kind": "block", "text": "x", "make": True, "wanted": True}
    converge(entry)
    assert other.samefile(path) and BEGIN_LINE in other.read_text()
    converge({**entry, "wanted": False})
    assert other.samefile(path) and other.read_text() == "mine\n"


def test_a_file_of_the_person_with_the_name_of_ours_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "presets.json"
    path.write_bytes(b'{"mine": "\xe9"}')
    entry = {"path": str(path), "kind": "own", "text": OURS, "wanted": True}
    with pytest.raises(module.Refused, match=f"^{re.escape(str(path))} is there and not ours; fix: move it"):
        converge(entry)
    assert not converge({**entry, "wanted": False})
    assert path.read_bytes() == b'{"mine": "\xe9"}'


@pytest.mark.parametrize("facts", [LINUX, MAC], ids=["linux", "mac"])
def test_every_file_of_our_own_says_so(facts: dict[str, str]) -> None:
    own = [entry for entry in files(facts).values() if entry["kind"] == "own"]
    assert len(own) == 3 and all(module.OWN in entry["text"] for entry in own)


@pytest.mark.parametrize("kind", ["block", "json"])
def test_any_bytes_get_the_block_and_come_back(kind: str, tmp_path: Path) -> None:
    path, theirs = tmp_path / "file", b'{"a": "caf\xe9 \xff"}\n'
    path.write_bytes(theirs)
    entry = {"paths": [str(path)], "kind": kind, "text": "x", "at": ["at"], "content": ITEMS, "wanted": True}
    module.planned(entry).shown["prepared"].encode()  # goes to the controller
    assert converge(entry) and BEGIN_LINE.encode()[2:] in path.read_bytes()
    assert converge({**entry, "wanted": False})
    assert path.read_bytes() == theirs


def test_a_folder_in_a_file_s_place_is_refused_with_a_fix(tmp_path: Path) -> None:
    entry = {"paths": [str(tmp_path)], "kind": "block", "text": "x", "wanted": True}
    with pytest.raises(module.Refused, match="is no file of text; fix: move it away"):
        module.planned(entry)


def test_bash_on_a_mac_keeps_the_file_that_it_reads(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in (".bash_profile", ".bash_login", ".profile", ".bash_profile")]
    (tmp_path / ".profile").write_text("mine\n")
    entry = {"paths": paths, "kind": "block", "text": "x", "make": True, "wanted": True}
    assert converge(entry)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".profile"]
    (tmp_path / ".bash_profile").write_text("new\n")  # the block is looked for where it is
    assert not converge(entry)


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("", ":1: is empty, no JSON"),
        ("[]", ":1: is no object of JSON"),
        ('{\n "at": 3}', ":2: at is no list"),
        ('{\n "at": [{"name": "B"}]}', ":2: B is set there already"),
        ('{"a" 1}', ":1: cannot be read as JSON: ':' is missing"),
        ('{"a": [1 2]}', ":1: cannot be read as JSON: ',' or ']' is missing"),
        ('{"a": 1', ":1: cannot be read as JSON: ',' or '}' is missing"),
        ('{"a": "x', ":1: cannot be read as JSON: a value is missing"),
        ('{"a": ' + "[" * 100_000, ":1: cannot be read as JSON"),
        ("{\n  /* BEGIN llmbox */\n}", ":2: half a block of llmbox, or two of them"),
    ],
)
def test_what_cannot_be_changed_safely_is_refused_with_its_line(
    text: str, refusal: str, tmp_path: Path
) -> None:
    path = tmp_path / "settings.json"
    path.write_text(text)
    entry = {"path": str(path), "kind": "json", "at": ["at"], "content": ITEMS, "wanted": True}
    with pytest.raises(module.Refused, match=f"^{re.escape(f'{path}{refusal}')}.*; fix: "):
        module.planned(entry)
    assert path.read_text() == text


def test_the_diff_shows_none_of_the_person_s_lines(tmp_path: Path) -> None:
    path = tmp_path / "rc"
    path.write_text("export TOKEN=secret\n")
    entry = {"paths": [str(path)], "kind": "block", "text": "ours", "make": True, "wanted": True}
    shown = module.planned(entry).shown["prepared"]
    assert "+ours" in shown and "secret" not in shown
