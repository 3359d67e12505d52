"""`llmbox-drift`: record what was deployed on this box, and name each difference since.

The end of a play calls `record` with what its roles say they deployed (JSON on standard input). It adds what
lies on the disk of that and keeps both in /var/lib/llmbox/deployed.json. `check` looks again. An update of
llama.cpp, or its way back, calls `renew` with the folder of the build.
Exit codes: 0 as deployed, 1 something differs (a line each), 2 could not look, or bad usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmbox.drift import host
from llmbox.drift.compare import (
    OF_THE_MODE,
    UNREADABLE,
    Difference,
    Entry,
    compare,
    compare_all,
    kind,
    member_differences,
    printable,
    unit_differences,
    word_differences,
)
from llmbox.drift.models import model_differences
from llmbox.drift.trees import surveyed, tree_differences

STATE = Path("/var/lib/llmbox")
MANIFEST, REPORT, BLOCKS = "deployed.json", "drift.json", "model-blocks.json"
VERSION = 1
# What a role may say that it deployed; docs/drift.md says what each means.
FACTS = frozenset(
    {"files", "lines", "environments", "builds", "models", "units", "members"}
    | {"kernel_parameters", "held_packages", "tables"}
)
AS_DEPLOYED, DRIFTED, COULD_NOT_LOOK = 0, 1, 2
LINES_SHOWN = 100


class CouldNotLook(Exception):
    """There is nothing to compare with, or no right to look; the text is one line with the fix."""


def manifest_of(deployed: Mapping[str, Any]) -> dict[str, Any]:
    """What the roles say, and what lies on the disk of it now. Raises OSError."""
    paths = surveyed(deployed)
    # release.json and the list of an environment are kept by their checksum: they are the lists of others.
    lists = {path for path in paths if path.endswith(".json") and path not in deployed.get("files", [])}
    entries: dict[str, Entry | None] = {path: kept(path, text=path not in lists) for path in paths}
    found = {
        path: kept(path) for path in host.overrides(deployed.get("units", []), deployed.get("files", []))
    }
    # Not where they came from: an address may hold a password.
    models = [
        {**one, "files": [{key: file[key] for key in ("file", "size", "sha256")} for file in one["files"]]}
        for one in deployed.get("models", [])
    ]
    said = {**deployed, "models": models}
    return {
        "version": VERSION,
        "deployed": said,
        "entries": entries,
        "drop_ins": found,
        "tables": loaded_tables(deployed),
    }


def loaded_tables(deployed: Mapping[str, Any]) -> dict[str, Entry | None]:
    """The nftables tables that roles load, as they are loaded now."""
    return {f"nftables table {name}": host.table(name) for name in deployed.get("tables", [])}


def kept(path: str, *, text: bool = True) -> Entry | None:
    """What `look` says, without what follows from the rest. Raises OSError for what cannot be read."""
    entry = host.look(path)
    if entry and entry["type"] == UNREADABLE:
        raise OSError(f"{path}: {kind(entry)}")
    left_out = {*OF_THE_MODE, *([] if text else ["text"])}
    return entry and {key: value for key, value in entry.items() if key not in left_out}


def record(deployed: Mapping[str, Any], state: Path, *, dry_run: bool) -> dict[str, Any]:
    """Keep what was deployed, when it differs from what was kept. Returns what an Ansible task returns.

    Raises CouldNotLook for a fact that nobody would look at, OSError.
    """
    if unknown := sorted(deployed.keys() - FACTS):
        raise CouldNotLook(f"nothing looks at {unknown[0]!r}; fix: use one of {', '.join(sorted(FACTS))}")
    former = read_json(state / MANIFEST)
    manifest = json.loads(json.dumps(manifest_of(deployed)))
    if manifest == former:
        return {"changed": False}
    if not dry_run:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(state / MANIFEST, manifest)
    header = str(state / MANIFEST)
    diff = {
        "before_header": header,
        "after_header": header,
        "before": lines(former),
        "after": lines(manifest),
    }
    return {"changed": True, "diff": diff}


def renew(build: str, state: Path) -> bool:
    """Take what lies in the folder of one build into the record: its releases changed places.

    Returns whether the record changed; never where it does not know the build. Raises OSError.
    """
    manifest = read_json(state / MANIFEST)
    if manifest.get("version") != VERSION or build not in manifest["deployed"].get("builds", []):
        return False
    others = {path: entry for path, entry in manifest["entries"].items() if not path.startswith(f"{build}/")}
    fresh = {**manifest, "entries": others | manifest_of({"builds": [build]})["entries"]}
    if fresh == manifest:
        return False
    write_json(state / MANIFEST, fresh)
    return True


def lines(manifest: Mapping[str, Any]) -> str:
    """A manifest for --diff, without the texts."""
    entries = {**manifest.get("entries", {}), **manifest.get("drop_ins", {}), **manifest.get("tables", {})}
    there = [
        f"{path}: {' '.join(value for key, value in entry.items() if key != 'text')}"
        for path, entry in sorted(entries.items())
        if entry
    ]
    deployed = manifest.get("deployed", {})
    return "".join(f"{line}\n" for line in [*there, *(f"{key}: {deployed[key]}" for key in sorted(deployed))])


def check(state: Path, *, full: bool, day: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report, and what full reads learned of models. Changes nothing. Raises CouldNotLook, OSError."""
    if os.geteuid() != 0 and state == STATE:
        raise CouldNotLook("only root can look at everything; type: sudo llmbox-drift check")
    manifest = read_json(state / MANIFEST)
    if manifest.get("version") != VERSION:
        raise CouldNotLook(f"{state / MANIFEST} does not say what was deployed; fix: run site.yml")
    deployed, blocks = manifest["deployed"], read_json(state / BLOCKS)
    units = deployed.get("units", [])
    overrides = host.overrides(units, deployed.get("files", []))
    kernel = Path("/proc/cmdline").read_text(encoding="utf-8", errors="replace").split()
    held = deployed.get("held_packages", [])
    now = time.time()
    differences = [
        *compare_all(manifest["entries"], {path: host.look(path) for path in manifest["entries"]}),
        *compare_all(manifest["drop_ins"], overrides),
        *compare_all(manifest.get("tables", {}), loaded_tables(deployed)),
        *unit_differences(units, host.unit_states(units)),
        *member_differences(
            deployed.get("members", []), host.groups_of(one["user"] for one in deployed.get("members", []))
        ),
        *line_differences(deployed.get("lines", [])),
        *word_differences("/proc/cmdline", deployed.get("kernel_parameters", []), kernel, "given"),
        *word_differences("packages", held, host.held_packages() if held else (), "held"),
        *model_differences(
            deployed.get("models", []), blocks, full=full, day=int(now // 86400) if day is None else day
        ),
        # Last: a folder of 2,000 files may differ in each.
        *tree_differences(manifest),
    ]
    report = {
        "ok": not differences,
        "checked": moment(now),
        "deployed": moment((state / MANIFEST).stat().st_mtime),
        "models": "full" if full else "sampled",
        "drift": [asdict(each) for each in differences],
        "overrides": [
            path
            for path, entry in sorted(manifest["drop_ins"].items())
            if not any(compare(path, entry, overrides.get(path)))
        ],
    }
    paths = {
        f"{group['directory']}/{file['file']}"
        for group in deployed.get("models", [])
        for file in group["files"]
    }
    return report, {path: known for path, known in blocks.items() if path in paths}


def line_differences(texts: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    """Lines that are no longer in the texts of somebody else."""
    for one in texts:
        try:
            found = host.lines_of(one["path"])
        except OSError as error:
            yield Difference(one["path"], kind({"type": "file"}), kind(host.unreadable(error)))
        else:
            yield from word_differences(one["path"], one["lines"], found, "in it")


def answer(state: Path) -> dict[str, Any]:
    """The report of a check that reads samples, or {"error": why there is none}: for verify_health."""
    try:
        return check(state, full=False)[0]
    except (CouldNotLook, OSError, ValueError) as error:
        return {"error": str(error)}


def moment(seconds: float) -> str:
    """A moment as ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of root's; {} when there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a file for root only, in one step. Raises OSError."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(
        os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as handle:
        json.dump(data, handle, indent=1, sort_keys=True)
        handle.write("\n")
    fresh.replace(path)


def screen(report: Mapping[str, Any]) -> str:
    """A line for each difference, then what was compared."""
    count = len(report["drift"])
    found = [str(Difference(**each)) for each in report["drift"][:LINES_SHOWN]]
    found += (
        [f"… and {count - LINES_SHOWN} more; all: llmbox-drift check --json"] if count > LINES_SHOWN else []
    )
    found += [
        f"{printable(path)}: a local override, as it was when last deployed" for path in report["overrides"]
    ]
    verdict = f"{count} differences; fix: run site.yml (it keeps drop-ins)" if count else "as deployed"
    return "\n".join([*found, f"{verdict} (of {report['deployed']}, models {report['models']})"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "llmbox-drift",
        description="Compare this box with what was deployed on it.",
        epilog="exit codes: 0 as deployed, 1 something differs, 2 could not look",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="check|record|renew")
    looking = verbs.add_parser("check", help="name each difference", allow_abbrev=False)
    looking.add_argument(
        "--models", choices=["sampled", "full"], default="sampled", help="how much is read of them"
    )
    looking.add_argument("--json", action="store_true", help="print one JSON object")
    looking.add_argument("--keep", action="store_true", help=f"keep the report in {STATE / REPORT}")
    keeping = verbs.add_parser(
        "record", help="keep what was deployed, told on standard input", allow_abbrev=False
    )
    keeping.add_argument("--dry-run", action="store_true", help="only say whether it differs")
    renewing = verbs.add_parser(
        "renew", help="keep where the releases of one build lead now", allow_abbrev=False
    )
    renewing.add_argument("build", metavar="DIRECTORY", help="the folder of the build")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    options = parse(argv)
    try:
        if options.verb == "record":
            print(json.dumps(record(json.load(sys.stdin), STATE, dry_run=options.dry_run)))
            return AS_DEPLOYED
        if options.verb == "renew":
            renew(options.build, STATE)
            return AS_DEPLOYED
        report, blocks = check(STATE, full=options.models == "full")
        # First: a disk that fails may take no more writes either.
        print(json.dumps(report) if options.json else screen(report), flush=True)
        if options.keep:
            write_json(STATE / REPORT, report)
            write_json(STATE / BLOCKS, blocks)
    except (CouldNotLook, OSError, ValueError) as error:
        print(f"llmbox-drift: {error}", file=sys.stderr)
        return COULD_NOT_LOOK
    return AS_DEPLOYED if report["ok"] else DRIFTED
