"""Ansible module: all model files of one host, in one task."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import pwd
import re
import stat
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from roles.gguf_models.module_utils.gguf_files import store, worker
else:
    # The package's other module, download, comes along with worker.
    from ansible.module_utils.gguf_files import store, worker

DOCUMENTATION = """
module: gguf_models
short_description: Model files in one directory, downloaded, verified and reported
description:
  - Checks every file against its locked size and sha256, downloads or copies what is missing with resume, and
    reports (or removes) model files that nothing uses.
  - The download runs in the transient unit C(gguf-fetch) as the files' owner.
  - A later run finds it and follows it.
options:
  models:
    description: Models as the filter C(llama_models) gives them.
    type: list
    elements: dict
    required: true
  directory:
    description: The models directory.
    type: path
    required: true
  owner:
    description: User who owns the directory and runs the download.
    type: str
    required: true
  reserve_bytes:
    description: Bytes that stay free on the file system.
    type: int
    default: 0
  verify:
    description: C(stat) hashes a file again only when its stat changed since it was verified, C(full) always.
    type: str
    choices: [stat, full]
    default: stat
  remove_unused:
    description: Remove model files that are neither installed by this task nor in O(keep).
    type: bool
    default: false
  keep:
    description: Files on the host that a model of the inventory is copied from. They are never unused.
    type: list
    elements: path
    default: []
  hf_endpoint:
    description: The hub or a mirror of it.
    type: str
    default: https://huggingface.co
  hf_token:
    description: Token for the hub, sent to O(hf_endpoint) only.
    type: str
  hf_token_file:
    description: File on the host, readable for its owner only, that holds the token.
    type: path
  environment:
    description: Environment of the download, such as C(https_proxy). Its values are kept secret.
    type: dict
    default: {}
  connect_timeout:
    description: Seconds for a connection.
    type: int
    default: 30
  stall_timeout:
    description: Seconds without data after which the connection is given up.
    type: int
    default: 60
  retries:
    description: Tries without progress before a file is given up.
    type: int
    default: 6
  step:
    description: C(all) waits until the download ends. The action plugin uses the other two.
    type: str
    choices: [all, begin, follow]
    default: all
  follow_seconds:
    description: How long C(follow) waits at most.
    type: int
    default: 5
author: [llmbox]
"""

UNIT = "gguf-fetch"
STATE_DIRECTORY = Path("/run/gguf-models")
RUNTIME_DIRECTORY = Path("/run") / UNIT
# Without a follower for so long, a download for another list of models is left over from a killed play.
FOLLOWER_TIMEOUT_S = 90
DIRECTORY_MODE = 0o755
PROGRESS_MAX_BYTES = 1 << 16
PLAN_MAX_BYTES = 1 << 20
SYSTEMCTL_TIMEOUT_S = 60
SECRET_MIN_LENGTH = 6

SANDBOX = (
    "NoNewPrivileges=yes",
    "CapabilityBoundingSet=",
    "ProtectSystem=strict",
    "ProtectHome=read-only",
    "PrivateDevices=yes",
    "ProtectKernelTunables=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelLogs=yes",
    "ProtectControlGroups=yes",
    "ProtectHostname=yes",
    "RestrictSUIDSGID=yes",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "LockPersonality=yes",
    "MemoryDenyWriteExecute=yes",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
)


def as_owner(account: pwd.struct_passwd, work: Callable[[], Any]) -> Any:
    """What `work` returns (JSON), run in a child that has become `account`.

    So root follows no path that a user controls. Raises Refusal, also for an OSError.
    """
    if os.geteuid() != 0:
        return work()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        outcome: dict[str, Any]
        try:
            os.initgroups(account.pw_name, account.pw_gid)
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)
            os.umask(0o022)
            outcome = {"value": work()}
        except store.Refusal as refusal:
            outcome = {"refusal": str(refusal)}
        except OSError as problem:
            outcome = {
                "refusal": (
                    f"{problem.filename}: {problem.strerror or problem} (as {account.pw_name}); fix: give "
                    f"{account.pw_name} access to it"
                )
            }
        except BaseException:
            outcome = {"fault": traceback.format_exc()}
        with os.fdopen(writer, "w") as stream:
            json.dump(outcome, stream)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    outcome = json.loads(text)
    if "refusal" in outcome:
        raise store.Refusal(outcome["refusal"])
    if "fault" in outcome:
        raise RuntimeError(outcome["fault"])
    return outcome["value"]


def ensure_directory(directory: Path, account: pwd.struct_passwd, *, check: bool) -> bool:
    """Make the directory with its parents, as the owner where the owner may.

    Returns whether something was to do.
    """
    if directory.is_dir():
        if stat.S_IMODE(directory.stat().st_mode) == DIRECTORY_MODE:
            return False
        if not check:
            as_owner(account, lambda: directory.chmod(DIRECTORY_MODE))
        return True
    if check:
        return True
    ancestor = directory
    while not ancestor.exists():
        ancestor = ancestor.parent
    if as_owner(account, lambda: os.access(ancestor, os.W_OK)):
        as_owner(account, lambda: directory.mkdir(DIRECTORY_MODE, parents=True, exist_ok=True))
    else:
        directory.mkdir(DIRECTORY_MODE, parents=True)
        directory.chmod(DIRECTORY_MODE)
        os.chown(directory, account.pw_uid, account.pw_gid, follow_symlinks=False)
    return True


class Task:
    """One run of the module."""

    def __init__(self, module: AnsibleModule) -> None:
        """Raises Refusal for a model file that may not be."""
        self.module, self.check = module, bool(module.check_mode)
        params = self.params = module.params
        # A proxy's address may hold a password: results get the names only, and command lines nothing.
        self.environment = {name: str(value) for name, value in params["environment"].items()}
        params["environment"] = sorted(self.environment)
        self.directory = Path(params["directory"])
        self.plan = store.Plan(
            directory=str(self.directory),
            files=store.select(params["models"], params["hf_endpoint"]),
            reserve_bytes=params["reserve_bytes"],
            verify=params["verify"],
            hf_endpoint=params["hf_endpoint"],
            connect_timeout=params["connect_timeout"],
            stall_timeout=params["stall_timeout"],
            retries=params["retries"],
        )
        try:
            self.account: pwd.struct_passwd | None = pwd.getpwnam(params["owner"])
        except KeyError:
            self.account = None
        self.files = {file.name: file for file in self.plan.files}

    def begin(self) -> dict[str, Any]:
        """Look, and start what is missing.

        The result has `running: true` when there is something to follow.
        """
        if self.account is None:
            if not self.check:
                raise store.Refusal(
                    f"user {self.params['owner']} does not exist; fix: run the role llm_user first, or set "
                    "gguf_models_owner"
                )
            return self.describe(self.first_look(), changed=True)
        if self.check:
            changed = ensure_directory(self.directory, self.account, check=True)
            return self.describe(as_owner(self.account, self.survey), changed=changed)
        with self.only_one():
            return self.begin_alone(self.account)

    def begin_alone(self, account: pwd.struct_passwd) -> dict[str, Any]:
        """`begin` outside check mode, while no other play begins."""
        if self.running():
            msg = f"following the download that runs already (unit {UNIT})"
            return {"changed": True, "running": True, "msg": msg}
        changed = ensure_directory(self.directory, account, check=False)
        if os.geteuid() == 0:
            changed |= bool(store.adopt(self.directory, self.plan.names, account.pw_uid, account.pw_gid))
        before = as_owner(account, self.survey)
        removing = self.params["remove_unused"] and before["unused"]
        after = as_owner(account, self.tidy) if removing or before["modes"] else before
        result = self.describe(before, changed=changed)
        todo = [store.FileState(**state) for state in after["states"] if state["state"] != store.OK]
        missing = store.missing_bytes([self.files[state.name] for state in todo], todo)
        store.check_space(self.plan, missing, after["free"])
        if todo:
            self.start(account)
            result["running"] = True
        return result

    def follow(self, seconds: float) -> dict[str, Any]:
        """Wait at most `seconds` for the download to end. Raises Refusal for what it could not install."""
        deadline = time.monotonic() + seconds
        if STATE_DIRECTORY.is_dir():
            (STATE_DIRECTORY / "followed").touch()
        while (unit := show_unit())["ActiveState"] in ("active", "activating", "deactivating", "reloading"):
            if time.monotonic() >= deadline:
                return {
                    "changed": True,
                    "running": True,
                    "progress": store.read_json(RUNTIME_DIRECTORY / worker.PROGRESS_NAME, PROGRESS_MAX_BYTES),
                }
            time.sleep(0.2)
        result = store.read_json(RUNTIME_DIRECTORY / worker.RESULT_NAME, PLAN_MAX_BYTES)
        systemctl("reset-failed", f"{UNIT}.service")
        if result.get("plan") != self.plan.identity:
            raise store.Refusal(
                f"the download ended before it was done (unit {UNIT}: {unit['Result']}, status"
                f" {unit['ExecMainStatus']}); what came is kept; fix: see `journalctl -u {UNIT}`, then run"
                " again, it resumes"
            )
        if refusals := result.get("refusals"):
            more = f" (+{len(refusals) - 1} more: see `journalctl -u {UNIT}`)" if len(refusals) > 1 else ""
            raise store.Refusal(refusals[0] + more)
        if self.account is None:
            raise store.Refusal(f"user {self.params['owner']} is gone")
        survey = as_owner(self.account, self.survey)
        return {
            "changed": bool(result["installed"]),
            "installed": result["installed"],
            "verified": result["verified"],
            "msg": f"{len(self.files)} model files verified, {len(result['installed'])} of them new",
            **self.unused_report(survey),
        }

    def all(self) -> dict[str, Any]:
        """Both, for a caller without the action plugin."""
        result = self.begin()
        while result.pop("running", False):
            step = self.follow(60)
            result |= step | {"changed": result["changed"] or step["changed"]}
        return result

    def survey(self) -> dict[str, Any]:
        """As the owner: every file's state, what is unused, the free space.

        In check mode unstamped files are hashed.
        """
        states = store.inspect(self.plan)
        if self.check:
            states = [self.hashed(state) for state in states]
        return {
            "states": [vars(state) for state in states],
            "modes": [state.name for state in states if state.mode_differs],
            "unused": [vars(unused) for unused in store.unused_files(self.directory, self.wanted())],
            "free": store.free_bytes(self.directory),
        }

    def wanted(self) -> frozenset[str]:
        """As the owner: names in the directory that are no waste, sources of copies among them."""
        sources = [file.path for file in self.plan.files if file.path is not None]
        return self.plan.names | store.names_of(self.directory, [*sources, *self.params["keep"]])

    def hashed(self, state: store.FileState) -> store.FileState:
        """An unverified file's true state; nothing is written."""
        if state.state != store.UNVERIFIED:
            return state
        right = store.hash_file(self.directory / state.name) == self.files[state.name].sha256
        return store.FileState(state.name, store.OK if right else store.WRONG, state.mode_differs)

    def first_look(self) -> dict[str, Any]:
        """The survey of a host where not even the owner exists yet."""
        return {
            "states": [vars(store.FileState(name, store.MISSING)) for name in self.files],
            "modes": [],
            "unused": [],
            "free": store.free_bytes(self.directory),
        }

    def tidy(self) -> dict[str, Any]:
        """As the owner: remove what is unused, if that is wanted, and mend modes.

        Returns the survey after it.
        """
        with store.locked(self.directory):
            if self.params["remove_unused"]:
                store.remove_unused(self.directory, self.wanted())
            for state in store.inspect(self.plan):
                if state.mode_differs:
                    store.set_mode(self.directory, state.name)
        return self.survey()

    def describe(self, survey: dict[str, Any], *, changed: bool) -> dict[str, Any]:
        """The result of looking: what differs, as a message and a diff.

        In check mode also whether it would fit.
        """
        states = [store.FileState(**state) for state in survey["states"]]
        todo = [state for state in states if state.state in (store.MISSING, store.WRONG)]
        todo_bytes = store.missing_bytes([self.files[state.name] for state in todo], todo)
        removed = survey["unused"] if self.params["remove_unused"] else []
        if self.check:
            store.check_space(
                self.plan, todo_bytes, survey["free"] + sum(unused["size"] for unused in removed)
            )
        before = [self.line(state.name) for state in states if state.state in (store.OK, store.UNVERIFIED)]
        before += [f"{state.name} (other content)" for state in states if state.state == store.WRONG]
        before += [f"{unused['name']} (unused)" for unused in removed]
        msg = f"{len(states)} model files verified"
        if todo:
            would = "would download" if self.check else "downloading"
            msg = f"{would} {len(todo)} files, {store.gigabytes(todo_bytes)}"
        return {
            "changed": changed or bool(todo or removed or survey["modes"]),
            "msg": msg,
            "diff": {
                "before_header": str(self.directory),
                "after_header": str(self.directory),
                "before": "".join(f"{line}\n" for line in sorted(before)),
                "after": "".join(f"{self.line(name)}\n" for name in sorted(self.files)),
            },
            **self.unused_report(survey),
        }

    def line(self, name: str) -> str:
        """One file in a diff."""
        file = self.files[name]
        return f"{name} {store.gigabytes(file.size)} sha256 {file.sha256[:12]}"

    def unused_report(self, survey: dict[str, Any]) -> dict[str, Any]:
        """What nothing uses: in the result, and as a warning while it stays."""
        unused = [{"file": entry["name"], "bytes": entry["size"]} for entry in survey["unused"]]
        if not unused:
            return {"unused": []}
        if self.params["remove_unused"]:
            return {"unused": [], "removed": unused}
        names = ", ".join(f"{entry['file']} ({store.gigabytes(entry['bytes'])})" for entry in unused)
        self.module.warn(
            f"{self.directory}: no preset uses {names}; gguf_models_remove_unused: true removes it"
        )
        return {"unused": unused}

    @contextmanager
    def only_one(self) -> Iterator[None]:
        """Keep a second play from beginning at the same moment."""
        STATE_DIRECTORY.mkdir(DIRECTORY_MODE, exist_ok=True)
        with (STATE_DIRECTORY / "begin.lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def running(self) -> bool:
        """Whether a download for this very plan runs. A left-over one for another plan is stopped.

        Raises Refusal when another play follows a download for another plan.
        """
        if show_unit()["ActiveState"] not in ("active", "activating"):
            return False
        current = store.read_json(STATE_DIRECTORY / "plan.json", PLAN_MAX_BYTES)
        if current and store.Plan.from_json(json.dumps(current)).identity == self.plan.identity:
            return True
        followed = store.lstat(STATE_DIRECTORY / "followed")
        if followed is not None and time.time() - followed.st_mtime < FOLLOWER_TIMEOUT_S:
            raise store.Refusal(
                f"another play is downloading another list of models to {current.get('directory')} (unit"
                f" {UNIT}); fix: wait for it, or stop it with `systemctl stop {UNIT}`; both resume where they"
                " were"
            )
        systemctl("stop", f"{UNIT}.service")
        return False

    def start(self, account: pwd.struct_passwd) -> None:
        """Start the transient unit. Raises Refusal when systemd refuses it."""
        write_private(STATE_DIRECTORY / "plan.json", self.plan.to_json())
        write_worker(STATE_DIRECTORY / "worker.pyz")
        systemctl("reset-failed", f"{UNIT}.service")
        token = STATE_DIRECTORY / worker.TOKEN_CREDENTIAL
        environment = STATE_DIRECTORY / worker.ENVIRONMENT_CREDENTIAL
        credentials = {worker.PLAN_CREDENTIAL: STATE_DIRECTORY / "plan.json"}
        if self.environment:
            write_private(environment, json.dumps(self.environment))
            credentials[worker.ENVIRONMENT_CREDENTIAL] = environment
        if self.params["hf_token"]:
            write_private(token, self.params["hf_token"])
            credentials[worker.TOKEN_CREDENTIAL] = token
        elif self.params["hf_token_file"]:
            credentials[worker.TOKEN_CREDENTIAL] = private_file(Path(self.params["hf_token_file"]), account)
        properties = [
            *SANDBOX,
            f"User={account.pw_name}",
            f"ReadWritePaths={self.directory.resolve()}",
            "Type=exec",
            "UMask=0022",
            f"RuntimeDirectory={UNIT}",
            "RuntimeDirectoryPreserve=yes",
            "Nice=10",
            "TimeoutStopSec=20",
            *(f"LoadCredential={name}:{path}" for name, path in credentials.items()),
        ]
        (STATE_DIRECTORY / "followed").touch()
        try:
            started = subprocess.run(
                [
                    "systemd-run",
                    "--quiet",
                    f"--unit={UNIT}",
                    f"--description=Download models to {self.directory}",
                    *(f"--property={line}" for line in properties),
                    "--",
                    sys.executable,
                    "-I",
                    str(STATE_DIRECTORY / "worker.pyz"),
                ],
                capture_output=True,
                text=True,
                timeout=SYSTEMCTL_TIMEOUT_S,
                check=False,
            )
        finally:
            token.unlink(missing_ok=True)
            environment.unlink(missing_ok=True)
        if started.returncode != 0:
            reason = " ".join(started.stderr.split())
            raise store.Refusal(f"the unit {UNIT} did not start: {reason}; fix: see `journalctl -u {UNIT}`")


def private_file(path: Path, account: pwd.struct_passwd) -> Path:
    """A secret's file, checked.

    Raises Refusal when others than root and the owner could have read or written it.
    """
    status = store.lstat(path)
    if status is None:
        raise store.Refusal(
            f"gguf_models_hf_token_file: {path} does not exist; fix: put the token there, mode 0600"
        )
    if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077 or status.st_uid not in (0, account.pw_uid):
        raise store.Refusal(
            f"gguf_models_hf_token_file: {path} must be a regular file of root or {account.pw_name} that"
            f" nobody else can read; fix: `chown root: {path}; chmod 0600 {path}`"
        )
    return path


def write_private(path: Path, text: str) -> None:
    """Write a file for root only, in a directory of root's."""
    path.unlink(missing_ok=True)
    with os.fdopen(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as stream:
        stream.write(text)


def write_worker(path: Path) -> None:
    """Pack the package `gguf_files`, as this module's payload has it, into one file that Python runs."""
    package = store.__name__.rpartition(".")[0]
    draft = path.with_suffix(".new")
    with zipfile.ZipFile(draft, "w") as archive:
        for name in ("", ".store", ".download", ".worker"):
            spec = importlib.util.find_spec(package + name)
            source = spec.loader.get_source(package + name) if spec and spec.loader else None  # type: ignore[attr-defined]
            archive.writestr(f"gguf_files/{name[1:] or '__init__'}.py", source or "")
        archive.writestr("__main__.py", "import sys\nfrom gguf_files.worker import main\nsys.exit(main())\n")
    draft.chmod(0o644)
    draft.replace(path)


def systemctl(*arguments: str) -> str:
    """Output of systemctl; its exit code does not matter to the callers."""
    return subprocess.run(
        ["systemctl", *arguments], capture_output=True, text=True, timeout=SYSTEMCTL_TIMEOUT_S, check=False
    ).stdout


def show_unit() -> dict[str, str]:
    """State of the transient unit; ActiveState is 'inactive' when there is none."""
    text = systemctl("show", f"{UNIT}.service", "--property=ActiveState,Result,ExecMainStatus")
    return {
        "ActiveState": "inactive",
        "Result": "unknown",
        "ExecMainStatus": "0",
        **dict(re.findall(r"(\w+)=(.*)", text)),
    }


def main() -> None:
    """Ansible's entry point."""
    module = AnsibleModule(
        supports_check_mode=True,
        argument_spec={
            "models": {"type": "list", "elements": "dict", "required": True},
            "directory": {"type": "path", "required": True},
            "owner": {"type": "str", "required": True},
            "reserve_bytes": {"type": "int", "default": 0},
            "verify": {"type": "str", "choices": ["stat", "full"], "default": "stat"},
            "remove_unused": {"type": "bool", "default": False},
            "keep": {"type": "list", "elements": "path", "default": []},
            "hf_endpoint": {"type": "str", "default": store.HUB},
            "hf_token": {"type": "str", "no_log": True},
            "hf_token_file": {"type": "path", "no_log": False},
            "environment": {"type": "dict", "default": {}, "no_log": True},
            "connect_timeout": {"type": "int", "default": 30},
            "stall_timeout": {"type": "int", "default": 60},
            "retries": {"type": "int", "default": 6},
            "step": {"type": "str", "choices": ["all", "begin", "follow"], "default": "all"},
            "follow_seconds": {"type": "int", "default": 5},
        },
    )
    # Ansible blots a secret out wherever it occurs; a short one (`1`) would blot out numbers of the result.
    module.no_log_values = {value for value in module.no_log_values if len(value) >= SECRET_MIN_LENGTH}
    try:
        task = Task(module)
        steps: dict[str, Callable[[], dict[str, Any]]] = {
            "all": task.all,
            "begin": task.begin,
            "follow": lambda: task.follow(module.params["follow_seconds"]),
        }
        result = steps[module.params["step"]]()
    except store.Refusal as refusal:
        module.fail_json(msg=str(refusal))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
