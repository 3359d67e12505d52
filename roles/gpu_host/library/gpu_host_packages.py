#!/usr/bin/python3
"""Ansible module: packages of a vendor's apt repository, pinned to a version and held, in one task."""

from __future__ import annotations

import base64
import binascii
import hashlib
import http.client
import os
import re
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from roles.gpu_host.module_utils.gpu_host_tools import Refused, converge, must, present, run, work, write
else:
    from ansible.module_utils.gpu_host_tools import Refused, converge, must, present, run, work, write

DOCUMENTATION = r"""
---
module: gpu_host_packages
short_description: Install packages of a vendor's repository at pinned versions, and hold them
description:
  - Fetches the repository's key, which must have O(fingerprint) and no other, and lets it sign for that
    repository alone.
  - Pins whole families to one version, because the vendor's packages ask for that version I(or a later one)
    of each other.
  - Everything from the repository that no pin names is only taken when asked for.
  - Installs what is not at its version, up or down, and puts all of it on hold.
  - Looks at what is installed. A run that was broken off is gone on with, and nothing is fetched when all is
    in place.
options:
  url: {description: The repository., type: str, required: true}
  key_url: {description: Where its key is., type: str, required: true}
  fingerprint: {description: The key's fingerprint., type: str, required: true}
  packages: {description: "Versions by package; empty is any that the pins allow.", type: dict, default: {}}
  families:
    description:
      - C(names) (globs) that belong together and the C(version) they are pinned to; without it only held.
        C(loaded) is the file in which the kernel tells the version of theirs that is loaded.
    type: list
    elements: dict
    default: []
  held: {description: Globs of other packages that are held., type: list, elements: str, default: []}
  headers:
    description: With O(packages), install the headers of the kernel where they are missing; DKMS needs them.
    type: bool
    default: false
author: [llmbox]
"""

EXAMPLES = r"""
- name: Install the driver
  gpu_host_packages:
    url: https://developer.download.nvidia.com/compute/cuda/repos/ubuntu2404/x86_64/
    key_url: https://developer.download.nvidia.com/compute/cuda/repos/ubuntu2404/x86_64/3bf863cc.pub
    fingerprint: EB693B3035CD5710E231E123A4B469963BF863CC
    packages: {nvidia-open-580: 580.159.03-1ubuntu1}
    families: [{names: ["*nvidia*"], version: 580.159.03-1ubuntu1}]
"""

RETURN = r"""
held: {description: Packages that are on hold now., returned: always, type: list}
displaced:
  description: The version that is loaded of a family whose packages go to another one; empty where none is.
  returned: always
  type: str
"""

KEY = Path("/etc/apt/keyrings/llmbox-nvidia.gpg")
SOURCE = Path("/etc/apt/sources.list.d/llmbox-nvidia.sources")
PREFERENCES = Path("/etc/apt/preferences.d/llmbox-nvidia")
# Packages that this has put on hold because the data named them, so that it can let them go again.
HELD = Path("/var/lib/llmbox/gpu-host-held")
KERNEL = os.uname().release
BUILD = Path(f"/lib/modules/{KERNEL}/build")  # a link that leads nowhere until the headers are there
# What an update of the kernel comes by, as linux-image-amd64; its headers come by a package of their own.
UPDATED_KERNEL = re.compile(r"linux-image-(?!unsigned-)[a-z].*")
MANAGED = "# Managed by llmbox: roles/gpu_host.\n"

FETCH_TIMEOUT_S = 60
KEY_LIMIT_BYTES = 1 << 20
UPDATE_TIMEOUT_S = 600
# The toolkit is some 4 GB, and DKMS compiles for every kernel.
INSTALL_TIMEOUT_S = 3 * 3600
LOCK = ("-o", "DPkg::Lock::Timeout=300")
PUBLIC_KEY_PACKET = 6
# Above 1000 a pin also goes back to a lower version; below 100 it never replaces what is installed.
PINNED, USED, ONLY_WHEN_ASKED = 1001, 500, 90

Installed = Mapping[str, tuple[str, str]]


# --- the key ---


def binary(key: bytes) -> bytes:
    """An OpenPGP key without its ASCII armour. Raises Refused."""
    if not key.lstrip().startswith(b"-----BEGIN PGP PUBLIC KEY BLOCK-----"):
        return key
    lines = [line.strip() for line in key.strip().splitlines()]
    start = lines.index(b"") + 1 if b"" in lines else 1  # an empty line ends the armour's headers
    body = [line for line in lines[start:] if line and not line.startswith((b"=", b"-----"))]
    try:
        return base64.b64decode(b"".join(body), validate=True)
    except binascii.Error:
        raise Refused("what the key's address gives is no OpenPGP key") from None


def packets(key: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and body of each packet (RFC 9580, 4.2). Raises Refused for what is none."""
    at = 0
    try:
        while at < len(key):
            head = key[at]
            if not head & 0x80:
                raise IndexError
            if head & 0x40:  # the newer format
                tag, first = head & 0x3F, key[at + 1]
                if first < 192:
                    size, skip = first, 2
                elif first < 224:
                    size, skip = ((first - 192) << 8) + key[at + 2] + 192, 3
                elif first == 255:
                    size, skip = int.from_bytes(key[at + 2 : at + 6], "big"), 6
                else:
                    raise IndexError
            else:
                tag, width = (head >> 2) & 0x0F, (1, 2, 4, 0)[head & 3]
                if not width:
                    raise IndexError
                size, skip = int.from_bytes(key[at + 1 : at + 1 + width], "big"), 1 + width
            body = key[at + skip : at + skip + size]
            if len(body) != size:
                raise IndexError
            yield tag, body
            at += skip + size
    except IndexError:
        raise Refused("what the key's address gives is no OpenPGP key") from None


def fingerprints(key: bytes) -> list[str]:
    """The fingerprints of all primary keys in it, of version 4. Raises Refused."""
    return [
        hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body, usedforsecurity=False).hexdigest().upper()
        for tag, body in packets(binary(key))
        if tag == PUBLIC_KEY_PACKET
    ]


def fetch(url: str) -> bytes:
    """What lies at an address. Raises Refused."""
    try:
        with urllib.request.urlopen(url, timeout=FETCH_TIMEOUT_S) as answer:  # noqa: S310 - the inventory's address
            found: bytes = answer.read(KEY_LIMIT_BYTES)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Refused(f"the key at {url} cannot be had: {error}") from None
    return found


def is_pinned(key: bytes, fingerprint: str) -> bool:
    """Whether it holds the one key, and no second one that could sign as well."""
    try:
        return fingerprints(key) == [fingerprint]
    except Refused:
        return False


def the_key(url: str, fingerprint: str) -> bytes:
    """The repository's key, from this host when it is there already. Raises Refused."""
    key = fetch(url)
    found = fingerprints(key)
    if found != [fingerprint]:
        raise Refused(
            f"the key at {url} has the fingerprint {', '.join(found) or 'of none'}, not {fingerprint}: it is "
            "somebody else's, or the vendor has a new one; fix: compare with what the vendor publishes, "
            "then gpu_host_repository_fingerprint"
        )
    return binary(key)


def key_in_place(fingerprint: str) -> bool:
    """Whether the key on this host is that one."""
    try:
        return is_pinned(KEY.read_bytes(), fingerprint)
    except OSError:
        return False


# --- what apt reads ---


def source(url: str) -> str:
    """The repository, a flat one, for which this one key signs."""
    return f"{MANAGED}Types: deb\nURIs: {url}\nSuites: /\nSigned-By: {KEY}\n"


def preferences(url: str, families: Sequence[Mapping[str, Any]]) -> str:
    """One stanza for each family, and one for the rest of the repository."""
    origin = f'origin "{urlsplit(url).hostname or ""}"'
    stanzas = [
        (
            " ".join(one["names"]),
            *((f"version {one['version']}", PINNED) if one.get("version") else (origin, USED)),
        )
        for one in families
    ]
    return MANAGED + "\n".join(
        f"Package: {names}\nPin: {pin}\nPin-Priority: {priority}\n"
        for names, pin, priority in [*stanzas, ("*", origin, ONLY_WHEN_ASKED)]
    )


# --- what is installed ---


def installed() -> dict[str, tuple[str, str]]:
    """Version and wish (`install`, `hold`) of every package that is installed whole."""
    listed = must(
        "dpkg-query",
        "--show",
        "--showformat=${Package}\t${Version}\t${db:Status-Want}\t${db:Status-Status}\n",
    )
    rows = [line.split("\t") for line in listed.splitlines()]
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 4 and row[3] == "installed"}


def unlike(packages: Mapping[str, str], there: Installed) -> list[str]:
    """Packages that are not installed at their version."""
    return [
        name
        for name, version in packages.items()
        if name not in there or (version and there[name][0] != version)
    ]


def strays(families: Sequence[Mapping[str, Any]], there: Installed) -> dict[str, str]:
    """Packages of a pinned family that are at another version, where apt would take the pinned one."""
    pinned = {
        name: str(family["version"])
        for family in families
        if family.get("version")
        for name, (version, _) in there.items()
        if _named(name, family["names"]) and version != family["version"]
    }
    if not pinned:
        return {}
    candidates = {}
    for line in must("apt-cache", "policy", *pinned).splitlines():
        if not line.startswith(" "):
            name = line.rstrip(":")
        elif line.strip().startswith("Candidate:"):
            candidates[name] = line.partition(":")[2].strip()
    return {name: version for name, version in pinned.items() if candidates.get(name) == version}


def loaded(family: Mapping[str, Any]) -> str:
    """The version of it that the kernel has loaded; empty where it has none."""
    try:
        return Path(family["loaded"]).read_text().strip()
    except (KeyError, FileNotFoundError):
        return ""


def is_loaded(family: Mapping[str, Any]) -> bool:
    """Whether that is the version asked for; what follows its hyphen is the package's."""
    found = loaded(family)
    return bool(found) and found == family["version"].partition("-")[0]


def displaced(families: Sequence[Mapping[str, Any]], changing: Iterable[str]) -> str:
    """The version that is loaded of a family whose packages go to another one; empty where none is.

    A driver of the kernel's works with libraries of its own version alone, until a boot loads another one.
    """
    for family in families:
        found = loaded(family)
        if found and not is_loaded(family) and any(_named(name, family["names"]) for name in changing):
            return found
    return ""


def missing_headers(families: Sequence[Mapping[str, Any]], there: Installed) -> list[str]:
    """Packages without which DKMS builds no module, and does not fail.

    For the kernel that runs, unless a module of it is loaded that somebody has built already, and for those
    that updates bring.
    """
    running = [] if BUILD.exists() or any(map(is_loaded, families)) else [f"linux-headers-{KERNEL}"]
    coming = [name.replace("image", "headers") for name in there if UPDATED_KERNEL.fullmatch(name)]
    if coming := [name for name in coming if name not in there]:
        known = {line.split()[0] for line in must("apt-cache", "madison", *coming).splitlines()}
        coming = [name for name in coming if name in known]
    return [*running, *coming]


def to_hold(families: Sequence[Mapping[str, Any]], held: Iterable[str], there: Installed) -> list[str]:
    """Installed packages that belong on hold."""
    return sorted(
        name
        for name, (version, _) in there.items()
        if _named(name, held)
        or any(
            _named(name, family["names"]) and family.get("version") in (None, "", version)
            for family in families
        )
    )


def _named(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def must_exist(packages: Mapping[str, str], url: str) -> None:
    """Refuse versions that no repository has, naming those that it has. Raises Refused."""
    for name, version in packages.items():
        rows = [line.split("|") for line in must("apt-cache", "madison", name).splitlines()]
        found = list(dict.fromkeys(row[1].strip() for row in rows if len(row) == 3))
        if not found and name.startswith("linux-headers-"):
            raise Refused(
                f"no repository has {name}, which the driver's module is built with: the kernel that runs is "
                "not the distribution's present one; fix: upgrade, reboot into that, then run this again"
            )
        if not found:
            raise Refused(
                f"{url} has no package {name}; fix: gpu_host_driver_packages, gpu_host_cuda_version"
            )
        if version and version not in found:
            raise Refused(
                f"{url} has no {name} {version}, but {', '.join(found[:6])}; "
                "fix: gpu_host_driver_version, gpu_host_cuda_version"
            )


def apply(wanted: Mapping[str, Any], check: bool) -> dict[str, Any]:
    """Compare, and unless this is a dry run, converge. Raises Refused."""
    packages: dict[str, str] = wanted["packages"]
    families, held = wanted["families"], wanted["held"]
    new_key = bool(packages) and not key_in_place(wanted["fingerprint"])
    if new_key and not check:  # refused before anything is written
        write(KEY, the_key(wanted["key_url"], wanted["fingerprint"]))
    diffs = converge(
        {
            SOURCE: source(wanted["url"]) if packages else None,
            PREFERENCES: preferences(wanted["url"], families) if packages else None,
        },
        check=check,
    )
    there = installed()
    packages = packages | strays(families, there) if packages else {}
    if wanted["headers"] and packages:
        packages |= dict.fromkeys(missing_headers(families, there), "")
    wrong = unlike(packages, there)
    lost = displaced(families, wrong)
    changed = [
        f"{name} {there[name][0] if name in there else '(none)'} -> {packages[name] or 'any'}"
        for name in wrong
    ]
    if wrong and not check:
        environment = {"DEBIAN_FRONTEND": "noninteractive", "NEEDRESTART_MODE": "l"}
        must("dpkg", "--configure", "-a", timeout_s=INSTALL_TIMEOUT_S, env=environment)
        update(wanted["url"])
        must_exist(packages, wanted["url"])
        install(packages, environment)
        there = installed()
        if wrong := unlike(packages, there):
            raise Refused(
                f"apt-get did not install {', '.join(wrong)} as asked; look with: apt-cache policy {wrong[0]}"
            )
    holding = to_hold(families, held, there)
    loose = [name for name in holding if there[name][1] != "hold"]
    ours = present(HELD) or ""
    let_go = [name for name in ours.split() if name not in holding and there.get(name, ("", ""))[1] == "hold"]
    if not check:
        named = [name for name in holding if _named(name, held) and name in (*loose, *ours.split())]
        # First: broken off after it, the next run still knows whose they are.
        converge({HELD: "".join(f"{name}\n" for name in [*named, *let_go]) or None}, check=False)
        if loose or let_go:
            wishes = [*(f"{name} hold\n" for name in loose), *(f"{name} install\n" for name in let_go)]
            must("dpkg", "--set-selections", stdin="".join(wishes))
        converge({HELD: "".join(f"{name}\n" for name in named) or None}, check=False)
    if not check and not packages:
        KEY.unlink(missing_ok=True)
    if changed or loose or let_go:
        after = [
            *changed,
            *(f"{name}: on hold" for name in loose),
            *(f"{name}: no longer on hold" for name in let_go),
        ]
        diffs.append(
            {
                "before_header": "packages",
                "after_header": "packages",
                "before": "",
                "after": "\n".join(after) + "\n",
            }
        )
    return {"changed": bool(new_key or diffs), "diff": diffs, "held": holding, "displaced": lost}


def update(url: str) -> None:
    """Fetch this repository's list alone; what its key did not sign is refused. Raises Refused."""
    done = run(
        "apt-get", "update", "--error-on=any", *LOCK,
        "-o", f"Dir::Etc::sourcelist={SOURCE}", "-o", "Dir::Etc::sourceparts=-",
        "-o", "APT::Get::List-Cleanup=0",
        timeout_s=UPDATE_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode != 0:
        said = [line.strip() for line in done.stderr.splitlines() if line.startswith(("E:", "W:"))]
        raise Refused(f"apt-get cannot use {url}: {said[0] if said else f'exit {done.returncode}'}")


def install(packages: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """Install each at its version, up or down. Raises Refused."""
    must(
        "apt-get", "install", "--yes", "--no-install-recommends",
        "--allow-change-held-packages", "--allow-downgrades",
        *LOCK, "-o", "Dpkg::Options::=--force-confold", "-o", "Dpkg::Options::=--force-confdef",
        *(f"{name}={version}" if version else name for name, version in packages.items()),
        timeout_s=INSTALL_TIMEOUT_S, env=environment,
    )  # fmt: skip


def main() -> None:
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "key_url": {"type": "str", "required": True, "no_log": False},
            "fingerprint": {"type": "str", "required": True},
            "packages": {"type": "dict", "default": {}},
            "families": {"type": "list", "elements": "dict", "default": []},
            "held": {"type": "list", "elements": "str", "default": []},
            "headers": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    work(module, apply)


if __name__ == "__main__":
    main()
