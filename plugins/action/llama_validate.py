"""Check the data of every host of a group, and every host's role variables, before any host is contacted.

Prints one line, with -v one for each further problem:
`refused: <file>:<line>: <key> = <value>: <what is wrong, the limit>; fix: <fix> (+N more)`.
Nothing but files of the inventory is read, and no connection is opened.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml
from ansible import constants, context  # type: ignore[import-untyped]
from ansible.errors import AnsibleError  # type: ignore[import-untyped]
from ansible.inventory.helpers import sort_groups  # type: ignore[import-untyped]
from ansible.parsing.vault import EncryptedString  # type: ignore[import-untyped]
from ansible.plugins.action import ActionBase  # type: ignore[import-untyped]
from ansible.template import Templar  # type: ignore[import-untyped]
from ansible.utils.display import Display  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "apps/llama_common/src"))

from llama_common import firewall, fit
from llama_common.clients import client_problems
from llama_common.cuda import cuda_problems
from llama_common.guard import ENABLED, guard_problems
from llama_common.plain import plain, scalar
from llama_common.presets import HostConfig
from llama_common.problems import MISSING, InventoryError, Problem, redact
from llama_common.roles import RoleVariables
from llama_common.router import base_url, router_problems
from llama_common.rules import LOCK_COMMAND
from llama_common.source import Document, locked, shown

ROOT = Path(__file__).resolve().parents[2]
DATA = tuple(HostConfig.model_fields)
NEEDED = ("llama_cpp_builds", "gguf_models", "llama_presets")
UNDECRYPTABLE = "UndecryptableVaultError"  # ansible-core's own; its module is private


class UnreadableError(Exception):
    """A value that cannot be worked out, with its problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class ActionModule(ActionBase):  # type: ignore[misc]
    """`llama_validate: {group: llama_hosts, children: [llm_servers, ocr_servers]}`.

    A host of `children`, to which the roles go, must be in `group` and in one of them only.
    """

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset({"group", "children"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Check every host of the group. The result fails when something is refused."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        groups = variables["groups"]
        hosts = list(groups.get(self._task.args.get("group", "llama_hosts"), []))
        self._documents: dict[Path, Document] = {}
        self._unchecked: list[str] = []
        lines = list(
            dict.fromkeys(
                [
                    *self._misplaced(groups, hosts, variables["hostvars"]),
                    *(
                        line
                        for host in dict.fromkeys([*hosts, *groups["all"]])
                        for line in self._refusals(host, variables["hostvars"], with_data=host in hosts)
                    ),
                ]
            )
        )
        inventory = shown(Path(variables["hostvars"]._inventory._sources[0]))
        command = LOCK_COMMAND.replace("DIR", inventory)
        lines = [line.replace(LOCK_COMMAND, command) for line in lines]
        result.update(changed=False)
        if not hosts:
            Display().warning("no host in this group: nothing was checked; fix: put hosts into its children")
        if self._unchecked:
            reason = self._unchecked[0].replace(LOCK_COMMAND, command)
            more = f" (+{len(self._unchecked) - 1} more)" if len(self._unchecked) > 1 else ""
            Display().warning(f"whether it fits into the memory is not checked: {reason}{more}")
        if lines:
            more = f" (+{len(lines) - 1} more)" if len(lines) > 1 else ""
            display = Display()
            display.display(lines[0] + more, color=constants.COLOR_ERROR, stderr=True)
            for line in lines[1:]:
                display.v(line)
            count = "one problem" if len(lines) == 1 else f"{len(lines)} problems; -v shows them all"
            result.update(failed=True, msg=f"the inventory is refused, no host was contacted ({count})")
        return result

    def _misplaced(self, groups: Mapping[str, list[str]], hosts: list[str], hostvars: Any) -> Iterator[str]:
        """One line for each host that gets roles without its data being checked, or another group's data."""
        group, children = self._task.args.get("group", "llama_hosts"), self._task.args.get("children", [])
        inventory = shown(Path(hostvars._inventory._sources[0]))
        for host in dict.fromkeys(host for child in children for host in groups.get(child, [])):
            into = [child for child in children if host in groups.get(child, [])]
            if host not in hosts:
                problem = Problem(
                    (into[0], "hosts", host),
                    host,
                    f"is in {into[0]}, but not in {group}, whose data it needs",
                    f"make {into[0]} one of the children of {group}",
                )
                yield problem.line(inventory)
            elif len(into) > 1:
                problem = Problem(
                    (into[0], "hosts", host),
                    host,
                    f"is in {' and in '.join(into)}: the llama_presets of one would replace the other's",
                    "leave it in one of them",
                )
                yield problem.line(inventory)

    def _refusals(self, host: str, hostvars: Any, *, with_data: bool) -> Iterator[str]:
        """One line for each problem of one host: of the files' text first, then of names, then of values."""
        files = list(self._files(host, hostvars))
        broken = [(file, found) for file in files for found in self._document(file).problems]
        if broken:
            yield from (found.problem.line(f"{shown(file)}:{found.line}") for file, found in broken)
            return
        raw = hostvars.raw_get(host)
        problems = [problem for name in raw if (problem := self._roles.unknown(str(name), raw[name]))]
        try:
            values = self._role_variables(raw)
            problems += (wrong := self._roles.check(values))
            # First, as defaults of roles are worked out from it.
            config = HostConfig.load(self._data(raw)) if with_data else None
            if not wrong:
                problems += client_problems(values, self._llm_servers(hostvars))
                problems += firewall.problems(self._with_defaults(raw, values, firewall.VARIABLES))
            if not wrong and host in self._members("routers", hostvars):
                yield from self._of_router(values, files, host, hostvars)
            if config:
                problems += [] if wrong else cuda_problems(config, values)
                if not wrong and self._guarded(host, raw, values, hostvars):
                    problems += guard_problems(config)
                refused, unchecked = fit.check(config)
                problems += refused
                self._unchecked += [f"{host}: {one.preset}: {one.reason}" for one in unchecked]
        except UnreadableError as error:
            problems.append(error.problem)
        except InventoryError as error:
            problems += error.problems
        except AnsibleError as error:
            fix = f".venv/bin/ansible-inventory --host {host} says more"
            problems.append(Problem((host,), "…", str(error), fix))
        for problem in problems:
            yield self._line(problem, files, host, hostvars)

    def _guarded(self, host: str, raw: Mapping[str, Any], values: Mapping[str, Any], hostvars: Any) -> bool:
        """Whether a host is an LLM box that gets the GPU guard. Raises UnreadableError."""
        if host not in self._members("llm_servers", hostvars):
            return False
        return bool(self._with_defaults(raw, values, [ENABLED])[ENABLED])

    def _llm_servers(self, hostvars: Any) -> dict[str, list[str]]:
        """The presets of each LLM box, as they stand in the inventory."""
        hosts = self._members("llm_servers", hostvars)
        return {host: list(hostvars.raw_get(host).get("llama_presets") or {}) for host in hosts}

    def _members(self, name: str, hostvars: Any) -> list[str]:
        """The hosts of a group, none where there is no such group."""
        group = hostvars._inventory.groups.get(name)
        return [host.name for host in group.get_hosts()] if group else []

    def _of_router(
        self, values: Mapping[str, Any], files: list[Path], router: str, hostvars: Any
    ) -> Iterator[str]:
        """One line for each problem of a router beside the LLM boxes, at the host whose value it is."""
        boxes = [self._box(host, hostvars) for host in self._members("llm_servers", hostvars)]
        prefix = "litellm_router_"
        known = {**self._defaults, **values}
        options = {name.removeprefix(prefix): known[name] for name in known if name.startswith(prefix)}
        for box, problem in router_problems(boxes, options):
            own = list(self._files(box, hostvars)) if box else files
            yield self._line(problem, own, box or router, hostvars)

    def _box(self, host: str, hostvars: Any) -> dict[str, Any]:
        """What a router needs of a box. What cannot be read is left out: the box's own lines tell of it."""
        raw = hostvars.raw_get(host)
        presets = raw.get("llama_presets")
        try:
            listen = _resolve(raw.get("llm_gateway_listen"), ("llm_gateway_listen",), self._templar_of(raw))
            base_url(host, listen or ())
        except (UnreadableError, ValueError, TypeError):
            listen = None
        named = presets.items() if isinstance(presets, Mapping) else ()
        usable = {name: data for name, data in named if isinstance(data, Mapping)}
        return {"name": host, "listen": listen, "presets": usable}

    @cached_property
    def _roles(self) -> RoleVariables:
        """The variables of all roles beside the playbooks."""
        files = sorted(ROOT.glob("roles/*/meta/argument_specs.yml"))
        return RoleVariables.of(
            {file.parts[-3]: plain(self._loader.load_from_file(str(file))) for file in files}
        )

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        """The roles' defaults, which templates of the inventory may name."""
        found: dict[str, Any] = {}
        for file in sorted(ROOT.glob("roles/*/defaults/main.yml")):
            found |= self._loader.load_from_file(str(file), trusted_as_template=True) or {}
        return found

    def _templar_of(self, raw: Mapping[str, Any]) -> Any:
        return Templar(loader=self._loader, variables={**self._defaults, **raw})

    def _role_variables(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The role variables that are set for a host, templated. Raises UnreadableError."""
        names = self._roles.of_host(raw)
        templar = self._templar_of(raw) if names else None
        values = {name: _resolve(raw[name], (name,), templar) for name in names}
        # `-e name=value` can only bring text: it is read as YAML would, as the role itself does.
        for name in values:
            if isinstance(values[name], str) and any(
                str(text).startswith(f"{name}=") for text in context.CLIARGS.get("extra_vars") or ()
            ):
                values[name] = yaml.safe_load(values[name])
        return values

    def _with_defaults(
        self, raw: Mapping[str, Any], values: Mapping[str, Any], names: Iterable[str]
    ) -> dict[str, Any]:
        """These variables of a host: as they are set, or the role's defaults. Raises UnreadableError."""
        templar = self._templar_of(raw)
        missing = [name for name in names if name not in values]
        return {**values, **{name: _resolve(self._defaults[name], (name,), templar) for name in missing}}

    def _data(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The data of a host, templated value by value. Raises UnreadableError."""
        templar = self._templar_of(raw)
        for name in NEEDED:
            if name not in raw:
                fix = f"set it in group_vars, {name}: {{}} where there is none"
                raise UnreadableError(Problem((name,), MISSING, "is not set for this host", fix))
        return {name: _resolve(raw[name], (name,), templar) for name in DATA if name in raw}

    def _files(self, host: str, hostvars: Any) -> Iterator[Path]:
        """The variable files of a host, in Ansible's order: a later one wins."""
        inventory = hostvars._inventory
        entry = inventory.get_host(host)
        groups = [group.name for group in sort_groups(entry.get_groups()) if group.name != "all"]
        sources = [
            Path(source) for source in inventory._sources if "," not in source or Path(source).exists()
        ]
        beside_inventory = [source if source.is_dir() else source.parent for source in sources]
        folders = [*dict.fromkeys(beside_inventory), Path(self._loader.get_basedir())]
        for names, kind in ((["all"], "group_vars"), (groups, "group_vars"), ([host], "host_vars")):
            for folder in folders:
                for name in names:
                    for file in self._loader.find_vars_files(str(folder / kind), name):
                        yield Path(file)

    def _document(self, file: Path) -> Document:
        if file not in self._documents:
            self._documents[file] = Document.of(
                file.read_bytes(), partial(self._loader.get_text_file_contents, str(file))
            )
        return self._documents[file]

    def _line(self, problem: Problem, files: list[Path], host: str, hostvars: Any) -> str:
        """The refusal, with file and line of the value, and this inventory's name in commands."""
        inventory = shown(Path(hostvars._inventory._sources[0]))
        fix = problem.fix.replace(LOCK_COMMAND, LOCK_COMMAND.replace("DIR", inventory))
        located = Problem(problem.path, problem.value, problem.message, fix)
        top = problem.path[0]
        if any(top in str(text) for text in context.CLIARGS.get("extra_vars") or ()):
            return located.line("--extra-vars")
        own = hostvars._inventory.get_host(
            host
        ).vars  # beside its name in the list of hosts: beats group_vars
        for file in reversed(files):
            if top in own and "host_vars" not in (file.parent.name, file.parent.parent.name):
                break
            line = self._document(file).line(problem.path)
            if line is not None:
                return located.line(f"{shown(file)}:{line}")
        for file in self._host_lists(hostvars) if top in own else ():
            line = self._document(file).line_of_host(host, problem.path)
            if line is not None:
                return located.line(f"{shown(file)}:{line}")
        return located.line(f"{inventory} ({host})")

    def _host_lists(self, hostvars: Any) -> Iterator[Path]:
        """The YAML files of the inventory that name hosts."""
        for source in map(Path, hostvars._inventory._sources):
            files = sorted(source.iterdir()) if source.is_dir() else [source]
            yield from (file for file in files if file.suffix in (".yml", ".yaml") and file.is_file())


def _resolve(value: Any, path: tuple[str, ...], templar: Any) -> Any:
    """`value` as plain data, its templates resolved one by one. Raises UnreadableError, naming the key."""
    if isinstance(value, str) and ("{{" in value or "{%" in value):
        try:
            resolved = templar.template(value)
        except Exception as error:
            if type(error.__cause__).__name__ == UNDECRYPTABLE:
                raise UnreadableError(locked(path)) from None
            words = redact(" ".join(str(getattr(error, "message", error)).split()))
            problem = Problem(
                path,
                str(value),
                f"cannot be worked out: {words}",
                "define what it names, or write the value itself",
            )
            raise UnreadableError(problem) from error
        return scalar(resolved) if isinstance(resolved, str) else _resolve(resolved, path, templar)
    if isinstance(value, EncryptedString):
        try:
            return str(value)
        except AnsibleError:
            raise UnreadableError(locked(path)) from None
    if isinstance(value, Mapping):
        return {scalar(key): _resolve(value[key], (*path, str(key)), templar) for key in value}
    if isinstance(value, list | tuple):
        return [_resolve(child, (*path, str(index)), templar) for index, child in enumerate(value)]
    return scalar(value)
