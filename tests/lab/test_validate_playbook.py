"""The real playbooks/validate.yml on every broken inventory: refused in one line, and no host is contacted.

The hosts point at a listening socket of this test, and Ansible's ssh program is a script that writes down its
calls: both must see nothing. Needs no lab but for the lab's own inventory, whose key `make lab` makes. How
long a run takes is reported, never asserted.
"""

from __future__ import annotations

import re
import resource
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support import BIN, ROOT, PlaybookRun, ansible_playbook, keep_figures
from tests.support import run as execute
from tests.unit import broken_inventories as broken
from tests.unit.test_fit import header

PLAYBOOK = "playbooks/validate.yml"
BAR_S = 2.0
TIMEOUT_S = 30  # a hang, not a slow day
GATE = [case for case in broken.CASES if case.gate]
REST = [case for case in broken.CASES if not case.gate]


@dataclass
class Bait:
    """What a connection would run into."""

    listener: socket.socket
    calls: Path
    ssh: Path
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def variables(self) -> dict[str, object]:
        """Connection variables that lead every host here."""
        return {
            "ansible_host": "127.0.0.1",
            "ansible_port": self.listener.getsockname()[1],
            "ansible_user": "nobody",
            "ansible_ssh_executable": str(self.ssh),
        }

    def touched(self) -> list[str]:
        """Every sign of a connection, and a clean slate for the next look."""
        signs = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        try:
            connection, address = self.listener.accept()
        except BlockingIOError:
            return signs
        connection.close()
        return [*signs, f"connection from {address}"]


@pytest.fixture(scope="module")
def bait(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bait]:
    """A listening socket and a script in ssh's place; at the end, how long the runs took."""
    folder = tmp_path_factory.mktemp("bait")
    script, calls = folder / "ssh", folder / "calls"
    script.write_text(f'#!/bin/sh\necho "ssh $*" >> {calls}\nexit 255\n')
    script.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        made = Bait(listener, calls, script)
        yield made
    if made.seconds:
        print("\n" + keep_figures("validate", "validate.yml, wall clock", made.seconds, BAR_S))
        print(keep_figures("validate-cpu", "validate.yml, CPU", made.cpu_seconds, BAR_S))


def validate(folder: Path, files: broken.Files, bait: Bait, *args: str) -> PlaybookRun:
    """Write an inventory and run the playbook on it; its wall and CPU time are noted."""
    broken.write(files, folder, bait.variables)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = ansible_playbook(PLAYBOOK, *args, inventory=folder, timeout=TIMEOUT_S)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    bait.seconds.append(run.seconds)
    bait.cpu_seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return run


def refusals(run: PlaybookRun) -> list[str]:
    """The lines that refuse something."""
    return [line for line in (run.stdout + run.stderr).splitlines() if "refused:" in line]


def check(case: broken.Case, folder: Path, bait: Bait) -> None:
    """One line, which names file, key, value and fix; no traceback; no connection."""
    run = validate(folder, broken.inventory(case), bait)
    assert run.rc != 0, run.tail()
    lines = refusals(run)
    assert len(lines) == 1, run.tail()
    line = lines[0].removeprefix("[ERROR]: ")
    assert line.startswith(f"refused: {folder}"), line
    assert f" {case.key} = " in line, line
    assert case.says in line, line
    fix = line.partition("; fix: ")[2]
    assert case.fix in fix and "--inventory DIR" not in fix, line  # it can be typed as it stands
    if case.name not in ("variable-not-set", "firewall-without-ssh"):  # which no file sets
        assert f"{folder / broken.PATHS[case.file]}:" in line, line
    if case.shown is not None:
        assert f" = {case.shown}: " in line
    assert line.isprintable()
    assert "Traceback" not in run.stdout + run.stderr
    assert "s3cret" not in run.stdout + run.stderr
    assert "hunter2" not in run.stdout + run.stderr
    assert bait.touched() == []


@pytest.mark.parametrize("case", GATE, ids=lambda case: case.name)
def test_refused(case: broken.Case, tmp_path: Path, bait: Bait) -> None:
    """At least one case of every kind."""
    check(case, tmp_path, bait)


@pytest.mark.long
@pytest.mark.parametrize("case", REST, ids=lambda case: case.name)
def test_refused_rest(case: broken.Case, tmp_path: Path, bait: Bait) -> None:
    """All other cases."""
    check(case, tmp_path, bait)


def test_the_sound_inventory_passes(tmp_path: Path, bait: Bait) -> None:
    """What the cases break is accepted before, again without a connection."""
    run = validate(tmp_path, broken.inventory(), bait).check()
    assert refusals(run) == []
    assert run.changed == 0
    assert bait.touched() == []


def test_all_problems_are_counted_and_shown_with_v(tmp_path: Path, bait: Bait) -> None:
    """Three mistakes: one line and their number; with -v all of them."""
    files = broken.inventory()
    for key in ("contxt", "thraeds", "paralel"):
        broken.preset(key, 1)(files)
    run = validate(tmp_path, files, bait)
    assert [line.endswith(" (+2 more)") for line in refusals(run)] == [True]
    verbose = validate(tmp_path, files, bait, "-v")
    assert len(refusals(verbose)) == 3


def test_a_limit_does_not_skip_the_checks(tmp_path: Path, bait: Bait) -> None:
    """--limit to another host, and a tag that no task has: the data is checked all the same."""
    case = next(case for case in broken.CASES if case.name == "unknown-key")
    for arguments in (("--limit", "ocr-box"), ("--tags", "nothing"), ("--check", "--diff")):
        run = validate(tmp_path, broken.inventory(case), bait, *arguments)
        assert run.rc != 0, arguments
        assert len(refusals(run)) == 1, arguments
    assert bait.touched() == []


def test_a_refusal_ends_the_whole_run(tmp_path: Path, bait: Bait) -> None:
    """A play that follows, as in site.yml, is not begun."""
    case = next(case for case in broken.CASES if case.name == "unknown-key")
    broken.write(broken.inventory(case), tmp_path / "inventory", bait.variables)
    playbook = tmp_path / "site.yml"
    playbook.write_text(
        f"""---
- name: Validate
  ansible.builtin.import_playbook: {ROOT / PLAYBOOK}
- name: Never reached
  hosts: llama_hosts
  gather_facts: false
  tasks:
    - name: Touch the host
      ansible.builtin.raw: "true"
"""
    )
    run = ansible_playbook(playbook, inventory=tmp_path / "inventory", timeout=TIMEOUT_S)
    assert run.rc != 0
    assert "Never reached" not in run.stdout
    assert bait.touched() == []


# One only looks, and tells of such a host like of any other fault; the others do what must be possible
# whatever the inventory says: going back, and waking a box. The last one opens no connection.
WITHOUT = {"verify.yml", "rollback_llama_cpp.yml", "remove.yml", "power.yml", "llm_boxes_only.yml"}
PLAYBOOKS = [
    str(file.relative_to(ROOT)) for file in sorted(ROOT.glob("playbooks/*.yml")) if file.name not in WITHOUT
]


@pytest.mark.parametrize("playbook", ["site.yml", *PLAYBOOKS])
def test_every_playbook_refuses_bad_data_of_any_host(playbook: str, tmp_path: Path, bait: Bait) -> None:
    """Also when it is run alone, on other hosts than the one whose data is wrong."""
    files = broken.inventory()
    broken.role("llm_user_uid", 999)(files)
    broken.write(files, tmp_path, bait.variables)
    (tmp_path / "clients.yml").write_text("clients: {hosts: {laptop: {}}}\n")
    run = ansible_playbook(playbook, inventory=tmp_path, timeout=TIMEOUT_S)
    assert run.rc != 0
    (line,) = refusals(run)
    assert "llm_user_uid = 999: " in line
    assert bait.touched() == []


def test_a_run_checks_the_data_once(tmp_path: Path, bait: Bait) -> None:
    """However many of its playbooks import the check, and with --limit too."""
    broken.write(broken.inventory(), tmp_path / "inventory", bait.variables)
    playbook = tmp_path / "site.yml"
    playbook.write_text("---\n" + f"- ansible.builtin.import_playbook: {ROOT / PLAYBOOK}\n" * 3)
    for host, arguments in (("localhost", ()), ("ocr-box", ("--limit", "ocr-box"))):
        run = ansible_playbook(playbook, *arguments, inventory=tmp_path / "inventory", timeout=TIMEOUT_S)
        counts = run.check().recap[host]
        assert (counts["ok"], counts["skipped"]) == (1, 2), run.tail()


def test_a_second_inventory_is_not_left_unverified(tmp_path: Path, bait: Bait) -> None:
    """verify.yml hands one on to the script that looks at its hosts."""
    both = [tmp_path / name for name in ("one", "two")]
    for folder in both:
        broken.write(broken.inventory(), folder, bait.variables)
    run = ansible_playbook("playbooks/verify.yml", "-i", both[1], inventory=both[0], timeout=TIMEOUT_S)
    assert run.rc != 0 and bait.touched() == []
    line = f"-i {both[0]} -i {both[1]}: only one inventory can be verified at a time; fix: run it for each"
    assert line in run.stdout


def test_extra_variables_are_checked_and_named(tmp_path: Path, bait: Bait) -> None:
    """What -e brings in has no file; the line says where it came from."""
    run = validate(tmp_path, broken.inventory(), bait, "-e", '{"llama_presets_listen": "everywhere"}')
    (line,) = refusals(run)
    assert line.startswith('refused: --extra-vars: llama_presets_listen = "everywhere": ')


def test_text_of_extra_variables_is_read_as_yaml(tmp_path: Path, bait: Bait) -> None:
    """`-e name=value` brings only text: what is a number or a boolean in it is none the worse for that."""
    sound = ("-e", "llama_cpp_keep_releases=3", "-e", "gguf_models_remove_unused=true")
    validate(tmp_path, broken.inventory(), bait, *sound).check()
    run = validate(tmp_path, broken.inventory(), bait, "-e", "llama_cpp_keep_releases=0")
    (line,) = refusals(run)
    assert line.startswith("refused: --extra-vars: llama_cpp_keep_releases = 0: must be at least 1; fix: ")


def test_every_host_s_role_variables_are_checked_with_the_defaults_at_hand(
    tmp_path: Path, bait: Bait
) -> None:
    """A client has no models, but variables; and a template may name what only a role's defaults set."""
    files = broken.inventory()
    broken.role("gguf_models_dir", "{{ llm_user_home }}/gguf")(files)
    broken.write(files, tmp_path, bait.variables)
    clients = tmp_path / "clients.yml"
    clients.write_text("clients: {hosts: {laptop: {base_packages: [acl]}}}\n")
    validate(tmp_path, files, bait).check()
    clients.write_text("clients: {hosts: {laptop: {base_packages: acl}}}\n")
    (line,) = refusals(validate(tmp_path, files, bait))
    assert f'refused: {clients}:1: base_packages = "acl": must be a list' in line
    assert bait.touched() == []


def test_a_preset_that_the_card_has_no_room_for_is_refused_with_what_would_fit(
    tmp_path: Path, bait: Bait
) -> None:
    """And what it says is enough."""
    files = broken.inventory()
    files["lock"]["llama_lock"]["headers"] = {"qwen-coder-q4": header("qwen3moe", tmp_path)}
    broken.role("llama_presets_gpu_memory_mib", 1024 + 300)(files)
    broken.preset("draft", "none")(files)
    broken.preset("n_cpu_moe", 0)(files)
    run = validate(tmp_path / "inventory", files, bait)
    (line,) = refusals(run)
    assert run.rc != 0 and bait.touched() == []
    assert "llama_presets.coder.context = 98304: " in line and "GiB of the GPU" in line
    found = re.search(r"; fix: write n_cpu_moe: (\d)", line)
    assert found, line
    broken.preset("n_cpu_moe", int(found[1]))(files)
    validate(tmp_path / "inventory", files, bait).check()


def test_a_router_that_does_not_fit_the_boxes_is_refused(tmp_path: Path, bait: Bait) -> None:
    """Each line leads to the value that is to be changed: the router's own, or the box's."""
    files = broken.inventory()
    presets = files["presets"]["llama_presets"]
    presets["cloud"] = {**presets["gemma"], "aliases": []}
    files["presets"]["llm_gateway_listen"] = ["127.0.0.1:1234"]
    broken.write(files, tmp_path, bait.variables)
    (tmp_path / "routers.yml").write_text("routers: {hosts: {router: }}\n")
    own = tmp_path / "group_vars/routers.yml"
    own.write_text("litellm_router_cloud_model: anthropic/x\nlitellm_router_box_keys: {smaug: s3cret}\n")
    run = ansible_playbook("playbooks/router.yml", "-v", inventory=tmp_path, timeout=TIMEOUT_S)
    found = "\n".join(refusals(run))
    assert run.rc != 0 and bait.touched() == []
    for part in (
        f'{own}:1: litellm_router_cloud_model = "anthropic/x": has no key; fix: set litellm_router_cloud_key',
        f'{own}:2: litellm_router_box_keys.smaug = "***": is no host of llm_servers; fix: name one of box',
        f'{tmp_path / broken.PATHS["presets"]}:3: llm_gateway_listen = ["127.0.0.1:1234"]: can be reached',
        'llama_presets.cloud = "…": is what the router\'s cloud model anthropic/x is called; fix: give',
    ):
        assert part in found
    assert "s3cret" not in run.stdout + run.stderr


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path, bait: Bait) -> None:
    broken.write(broken.inventory(), tmp_path, bait.variables)
    file = tmp_path / "group_vars/ocr_servers/name.yml"
    file.parent.mkdir()
    file.write_bytes("# why\nbase_note: café\n".encode("latin-1"))
    run = ansible_playbook(PLAYBOOK, inventory=tmp_path, timeout=TIMEOUT_S)
    (line,) = refusals(run)
    assert run.rc != 0
    assert f"refused: {file}:2: (text) = " in line and "is not UTF-8: byte 0xe9" in line
    assert line.endswith("; fix: save the file in the encoding UTF-8")


def encrypt(*words: str | Path, password: Path) -> str:
    """What ansible-vault prints."""
    return execute(BIN / "ansible-vault", *words, "--vault-password-file", password).check().stdout


def test_a_vault_without_its_password_is_named(tmp_path: Path, bait: Bait) -> None:
    """A whole file, a value, and one that a template names; with the password all are data like any other."""
    password, other = tmp_path / "password", tmp_path / "other"
    password.write_text("open\n")
    other.write_text("sesame\n")
    for place, edit in {"all": "file", "models": "file", "token": "value", "named": "template"}.items():
        folder = tmp_path / place
        broken.write(broken.inventory(), folder, bait.variables)
        file = folder / broken.PATHS.get(place, "group_vars/all/token.yml")
        if edit == "file":
            encrypt("encrypt", file, password=password)
            key = "(file)"
        else:
            key = "gguf_models_hf_token"
            name = "vault_token" if edit == "template" else key
            value = encrypt("encrypt_string", "hf_x", "--name", name, password=password)
            file.write_text(value if name == key else f'{key}: "{{{{ {name} }}}}"\n{value}')
        for given in ((), ("--vault-password-file", other)):
            run = ansible_playbook(PLAYBOOK, *given, inventory=folder, timeout=TIMEOUT_S)
            (line,) = refusals(run)
            assert run.rc != 0
            assert f"refused: {file}:1: {key} = " in line, line
            assert "no vault password that was given opens it; fix: add --ask-vault-pass or " in line
        given = ("--vault-password-file", password)
        ansible_playbook(PLAYBOOK, *given, inventory=folder, timeout=TIMEOUT_S).check()
    assert bait.touched() == []


def test_a_later_file_wins_and_is_named(tmp_path: Path, bait: Bait) -> None:
    """host_vars override group_vars: the line leads to the value that counts."""
    files = broken.inventory()
    broken.write(files, tmp_path, bait.variables)
    override = tmp_path / "host_vars/box.yml"
    override.parent.mkdir()
    override.write_text("# why\nllama_presets_listen: nowhere\n")
    run = validate(tmp_path, files, bait)
    assert f"refused: {override}:2: llama_presets_listen" in refusals(run)[0]


def test_a_value_beside_the_name_of_a_host_wins_and_is_named(tmp_path: Path, bait: Bait) -> None:
    """It overrides group_vars, where the same key is sound."""
    files = broken.inventory()
    broken.role("llm_gateway_listen", ["127.0.0.1"])(files)
    broken.write(files, tmp_path, bait.variables)
    (tmp_path / "more.yml").write_text("llm_servers:\n  hosts:\n    box:\n      llm_gateway_listen: [foo]\n")
    (line,) = refusals(ansible_playbook(PLAYBOOK, inventory=tmp_path, timeout=TIMEOUT_S))
    assert f'refused: {tmp_path / "more.yml"}:4: llm_gateway_listen.0 = "foo"' in line


@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        (
            "{llm_servers: {hosts: {box: }}, llama_hosts: {children: {ocr_servers: {hosts: {ocr-box: }}}}}",
            'llm_servers.hosts.box = "box": is in llm_servers, but not in llama_hosts, whose data it needs; '
            "fix: make llm_servers one of the children of llama_hosts",
        ),
        (
            "{llama_hosts: {children: {llm_servers: {hosts: {box: }}, ocr_servers: {hosts: {box: }}}}}",
            'llm_servers.hosts.box = "box": is in llm_servers and in ocr_servers: the llama_presets of one '
            "would replace the other's; fix: leave it in one of them",
        ),
        (
            "{llm_servers: {hosts: {box: {}}}}",
            "is in llm_servers, but not in llama_hosts",
        ),
    ],
    ids=["outside", "in both", "no such group"],
)
def test_a_host_in_the_wrong_groups_is_refused(tmp_path: Path, bait: Bait, hosts: str, said: str) -> None:
    """Its data would go unchecked, or be another group's."""
    broken.write(broken.inventory(), tmp_path, bait.variables)
    (tmp_path / "hosts.yml").write_text(f"all:\n  children: {hosts}\n")
    run = ansible_playbook(PLAYBOOK, inventory=tmp_path, timeout=TIMEOUT_S)
    (line,) = refusals(run)
    assert run.rc != 0 and f"refused: {tmp_path}: " in line and said in line
    assert bait.touched() == []


def test_the_lab_s_inventory_passes() -> None:
    """The data that `make lab` works with."""
    assert refusals(ansible_playbook(PLAYBOOK, timeout=TIMEOUT_S).check()) == []


def test_production_without_a_lock_is_refused_with_the_command(tmp_path: Path) -> None:
    """Nobody has verified its commits and checksums: the line says what writes the lock."""
    folder = tmp_path / "production"
    shutil.copytree(ROOT / "inventory/production", folder, ignore=shutil.ignore_patterns("lock.yml"))
    run = ansible_playbook(PLAYBOOK, inventory=folder, timeout=TIMEOUT_S)
    assert run.rc != 0
    (line,) = refusals(run)
    assert (
        f"not in the lock (llama_lock.builds); fix: run scripts/lock_models.py --inventory {folder} " in line
    )


def test_the_bait_works(tmp_path: Path, bait: Bait) -> None:
    """A play that does connect is noticed: by the script, and with the real ssh by the socket."""
    broken.write(broken.inventory(), tmp_path / "inventory", bait.variables)
    playbook = tmp_path / "connect.yml"
    playbook.write_text("""---
- name: Connect
  hosts: box
  gather_facts: false
  tasks:
    - name: Touch the host
      ansible.builtin.raw: "true"
""")
    assert ansible_playbook(playbook, inventory=tmp_path / "inventory", timeout=TIMEOUT_S).rc != 0
    assert any(sign.startswith("ssh ") for sign in bait.touched())
    ssh = shutil.which("ssh")
    if ssh is None:
        pytest.skip("no ssh on this machine: the socket is not tried")
    arguments = ("-e", f"ansible_ssh_executable={ssh}", "-e", "ansible_ssh_retries=0")
    with pytest.raises(Exception, match="timed out"):
        ansible_playbook(playbook, *arguments, inventory=tmp_path / "inventory", timeout=4)
    assert any(sign.startswith("connection from") for sign in bait.touched())


@pytest.mark.parametrize("name", ["update", "rollback"])
def test_an_ocr_box_is_refused_where_releases_are_compared(name: str, bait: Bait) -> None:
    done = ansible_playbook(
        f"playbooks/{name}_llama_cpp.yml",
        *("--limit", "ocr-box", "--extra-vars", f"ansible_ssh_executable={bait.ssh}"),
        inventory=ROOT / "inventory/production",
        timeout=TIMEOUT_S,
    )
    assert done.rc == 2 and "ocr-box is an OCR box: " in done.stdout, done.tail()
    assert "fix: write the commit that it should run into llama_cpp_builds, then site.yml" in done.stdout
    assert bait.touched() == []
