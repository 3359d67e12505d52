"""What a host says about itself, gathered in one go: verify_health.py and fleet.py run this there over ssh.

Standard library only, Python >= 3.9, nothing is changed. A part that cannot be read is None, never an
exception: the reader decides what that means. As root it sees every process; otherwise its user's own.
"""

from __future__ import annotations

import contextlib
import grp
import http.client
import ipaddress
import json
import os
import platform
import pwd
import shlex
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

COMMAND_TIMEOUT_S = 20
GPU_TIMEOUT_S = 5
SERVER_TIMEOUT_S = 10
SERVER_ANSWER_LIMIT = 4 * 1024 * 1024
TCP_LISTEN = "0A"
FIREWALL_TABLE = ("inet", "llmbox")
PCI = Path("/sys/bus/pci/devices")
CARD_SET_UP = Path("/etc/systemd/system/llmbox-gpu-devices.service")  # by role gpu_host
REMOVED_PARAMETERS = Path("/run/llmbox-kernel-parameters-removed")  # roles/gpu_host writes it
DRIVER_PARAMETERS = Path("/proc/driver/nvidia/params")
PCIE_CAPABILITY = 0x10


def command(argv: list[str], timeout: float = COMMAND_TIMEOUT_S) -> dict[str, Any] | None:
    """Exit code and output of a program; None when it is missing, "timeout" as its error when it hangs."""
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
    except OSError:
        return None
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()  # not waited for: a hung nvidia-smi cannot even be killed
        return {"rc": None, "out": "", "err": f"timeout after {timeout:g} s"}
    return {"rc": process.returncode, "out": out, "err": err}


def as_user(user: str, argv: list[str]) -> dict[str, Any] | None:
    """Run a program as the user of the model server, with its own systemd in reach."""
    try:
        uid = pwd.getpwnam(user).pw_uid
    except KeyError:
        return None
    if os.geteuid() == uid:
        return command(argv)
    return command(["runuser", "-u", user, "--", "env", f"XDG_RUNTIME_DIR=/run/user/{uid}", *argv])


def parsed(answer: dict[str, Any] | None) -> Any:
    """The JSON object that a program printed, or None."""
    try:
        return as_object(json.loads(answer["out"])) if answer else None
    except ValueError:
        return None


def as_object(value: Any) -> Any:
    """`value` when it is a JSON object, else None: what reads it relies on that."""
    return value if isinstance(value, dict) else None


def failed_units() -> list[str] | None:
    """System units in the state failed; None when systemctl does not say."""
    answer = command(["systemctl", "list-units", "--failed", "--plain", "--no-legend", "--no-pager"])
    if answer is None or answer["rc"] != 0:
        return None
    return [line.split()[0] for line in answer["out"].splitlines() if line.split()]


def account(user: str) -> dict[str, Any] | None:
    """Who the user is, and whether its systemd lives without a login."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        return None
    groups = sorted(
        {group.gr_name for group in grp.getgrall() if user in group.gr_mem}
        | {group.gr_name for group in grp.getgrall() if group.gr_gid == entry.pw_gid}
    )
    return {
        "uid": entry.pw_uid,
        "home": entry.pw_dir,
        "groups": groups,
        "linger": Path("/var/lib/systemd/linger", user).exists(),
    }


def listeners(process: Path) -> list[str]:
    """TCP addresses (host:port) on which a process listens; `process` is its folder under /proc."""
    inodes = sockets(process)
    return sorted(address for inode, address in listening(process / "net").items() if inode in inodes)


def sockets(process: Path) -> set[str]:
    """The inodes of a process's open sockets; empty when they cannot be read."""
    found = set()
    try:
        for entry in (process / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                found.add(str(entry.readlink()))
    except OSError:
        return set()
    return {target[8:-1] for target in found if target.startswith("socket:[")}


def listening(net: Path) -> dict[str, str]:
    """The TCP addresses that are listened on, by the inode of their socket; `net` as in /proc/net."""
    found = {}
    for name in ("tcp", "tcp6"):
        try:
            rows = [row.split() for row in (net / name).read_text().splitlines()[1:]]
        except OSError:
            continue
        for row in rows:
            if row[3] == TCP_LISTEN:
                address, port = row[1].split(":")
                # Words in the machine's order of bytes: little-endian on every box that is supported.
                words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
                host = str(ipaddress.ip_address(b"".join(words)))
                found[row[9]] = f"[{host}]:{int(port, 16)}" if ":" in host else f"{host}:{int(port, 16)}"
    return found


def holders(ports: list[int]) -> list[dict[str, Any]]:
    """Who listens on these TCP ports: each address with the control groups of the processes that hold it."""
    wanted = {
        inode: address
        for inode, address in listening(Path("/proc/net")).items()
        if int(address.rpartition(":")[2]) in ports
    }
    found: dict[str, set[str]] = {address: set() for address in wanted.values()}
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and wanted:
            for inode in sockets(process) & wanted.keys():
                found[wanted[inode]].add(control_group(process))
    return [{"address": address, "groups": sorted(groups)} for address, groups in sorted(found.items())]


def control_group(process: Path) -> str:
    """The path of a process's control group, in which systemd puts it; empty when it cannot be read."""
    try:
        lines = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
    except OSError:
        return ""
    # Which of the two hierarchies systemd uses differs; it is at the root of the other one, if that is there.
    return max((path for _, name, path in lines if name in ("", "name=systemd")), key=len, default="")


class OverSocket(http.client.HTTPConnection):
    """HTTP over the path of a UNIX socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        """Connect to the path."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def server(path: str) -> dict[str, Any]:
    """What the llama-server behind a socket says: the status of /health and the tokens of one slot."""
    found: dict[str, Any] = {"health": None, "n_ctx": None, "error": ""}
    try:
        for target in ("/health", "/props"):
            connection = OverSocket(path, SERVER_TIMEOUT_S)
            try:
                connection.request("GET", target)
                reply = connection.getresponse()
                body = reply.read(SERVER_ANSWER_LIMIT)
            finally:
                connection.close()
            if target == "/health":
                found["health"] = reply.status
            elif reply.status == 200:
                settings = as_object(json.loads(body)).get("default_generation_settings")
                found["n_ctx"] = as_object(settings)["n_ctx"]
    except (OSError, http.client.HTTPException) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    except (ValueError, LookupError, AttributeError, TypeError):
        found["error"] = "its answer is not llama-server's"
    return found


def servers() -> list[dict[str, Any]]:
    """Every llama-server process: pid, user, executable, listening addresses."""
    found: list[dict[str, Any]] = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            exe = str((process / "exe").readlink())
            if Path(exe.split(" (deleted)")[0]).name == "llama-server":
                uid = process.stat().st_uid
                found.append({"pid": int(process.name), "uid": uid, "exe": exe, "listen": listeners(process)})
        except OSError:
            continue
    return found


def units(names: list[str], user: str | None) -> dict[str, dict[str, str]] | None:
    """The state of systemd units, of `user`'s manager or (None) of the system's."""
    if not names:
        return {}
    wanted = "Id,LoadState,ActiveState,SubState,UnitFileState,NRestarts"
    argv = ["systemctl", *(["--user"] if user else []), "show", "--no-pager", "--property", wanted, *names]
    answer = as_user(user, argv) if user else command(argv)
    if answer is None or answer["rc"] != 0:
        return None
    blocks = [
        dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        for block in answer["out"].split("\n\n")
    ]
    return {block["Id"]: block for block in blocks if "Id" in block}


def gpu_guard(user: str) -> dict[str, Any]:
    """The unit of the GPU guard, and what the guard says."""
    unit = "gpu-guard.service"
    says = parsed(as_user(user, ["gpu-guard", "status", "--json"]))
    return {"unit": (units([unit], user) or {}).get(unit) or {}, "says": says}


def boot_links(user: str) -> list[str] | None:
    """Preset units that a hand-made link starts at boot: `UnitFileState` is silent on those."""
    try:
        folder = Path(pwd.getpwnam(user).pw_dir, ".config/systemd/user")
        return sorted({link.name for link in folder.glob("*.*/llama-*.service") if link.is_symlink()})
    except (KeyError, OSError):
        return None


def builds(root: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """For each build the release that `current` and `previous` point to, and the stamp of the current one."""
    found = {}
    for name in names:
        links = {}
        for link in ("current", "previous"):
            path = Path(root, name, link)
            links[link] = os.path.realpath(str(path)) if path.is_dir() else None
        stamp = None
        if links["current"]:
            try:
                written = json.loads(Path(links["current"], "release.json").read_text())
                stamp = {key: written.get(key) for key in ("commit", "cmake_options")}
            except (OSError, ValueError, AttributeError):
                stamp = None
        found[name] = {**links, "release": stamp}
    return found


def file_sizes(folder: str, names: list[str]) -> dict[str, int | None]:
    """Bytes of each file; None where it is missing or cannot be read."""
    found: dict[str, int | None] = dict.fromkeys(names)
    for name in names:
        file = Path(folder, name)
        try:
            found[name] = file.stat().st_size if file.is_file() else None
        except OSError:
            continue
    return found


def disk(path: str) -> dict[str, int] | None:
    """Free and total bytes of the file system that holds `path` or its nearest existing parent."""
    place = Path(path)
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        usage = shutil.disk_usage(str(place))
    except OSError:
        return None
    return {"free": usage.free, "total": usage.total}


def gpu() -> str | None:
    """One line about the GPU; None without the driver's program, "hung" or "failed" as a line of its own."""
    answer = command(
        [
            "nvidia-smi",
            "--query-gpu=name,memory.used,memory.total,temperature.gpu",
            "--format=csv,noheader,nounits",
        ],
        GPU_TIMEOUT_S,
    )
    if answer is None:
        return None
    if answer["rc"] is None:
        return f"hung: {answer['err']}"
    lines = str(answer["out"]).strip().splitlines()
    return lines[0] if answer["rc"] == 0 and lines else "failed"


def firewall(rules: str) -> dict[str, str] | None:
    """The firewall's table as it is loaded, and as `rules` would be, both in nft's own words."""
    table = " ".join(FIREWALL_TABLE)
    loaded = command(["nft", "--stateless", "list", "table", *FIREWALL_TABLE])
    # In a network namespace of its own, which ends with the program.
    script = f'printf %s "$0" | nft -f - && nft --stateless list table {table}'
    wanted = command(["unshare", "--net", "--", "sh", "-c", script, rules])
    if loaded is None or wanted is None or wanted["rc"] != 0:
        return None
    return {"loaded": loaded["out"], "wanted": wanted["out"]}


def ocr_layers(ocr: dict[str, Any]) -> dict[str, Any]:
    """What protects the GPU of an OCR box: of its host, of its program and of its units."""
    shown = [
        command(["systemctl", "show", "--value", "--property=ExecStartPre", unit]) for unit in ocr["workers"]
    ]
    return {
        "persistence": (units([ocr["persistence"]], None) or {}).get(ocr["persistence"]),
        "check": parsed(as_user(ocr["user"], ocr["check"])),
        "before_start": [answer["out"] if answer and answer["rc"] == 0 else "" for answer in shown],
    }


def link_control(config: bytes) -> dict[str, int] | None:
    """The ASPM bits of a PCIe device's configuration: what its link can do (LnkCap), what is on (LnkCtl)."""
    at = config[0x34] if len(config) > 0x34 and config[0x06] & 0x10 else 0
    for _ in range(48):  # as many capabilities as there is room for
        if at < 0x40 or at + 0x12 > len(config):
            return None
        if config[at] == PCIE_CAPABILITY:
            return {"can": config[at + 0x0D] >> 2 & 3, "on": config[at + 0x10] & 3}
        at = config[at + 1]
    return None


def links() -> list[dict[str, Any]]:
    """The link of each NVIDIA card, at both of its ends: what lspci -vv shows as LnkCtl. It takes root.

    A card that fell off the bus stays in /sys; what is read of it then has every bit set.
    """
    found = []
    for device in sorted(PCI.glob("*")):
        try:
            if (device / "vendor").read_text().strip() != "0x10de" or not (
                device / "class"
            ).read_text().startswith("0x03"):
                continue
            for end in (device, device.resolve().parent):
                config = (end / "config").read_bytes() if (end / "config").exists() else b""
                state, gone = link_control(config), config.startswith(b"\xff\xff")
                if end == device or state:
                    name = end.name if end == device else end.resolve().name
                    found.append({"device": name, "link": state, "gone": gone})
        except OSError:
            continue
    return found


def command_line() -> list[str]:
    """The words that the kernel was started with; none where it has no such file."""
    try:
        text = Path("/proc/cmdline").read_text()
    except OSError:
        return []
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def removed_parameters() -> list[str]:
    """Kernel parameters that role gpu_host has taken away since the machine was started."""
    try:
        return REMOVED_PARAMETERS.read_text().split()
    except OSError:
        return []


def driver_parameter(name: str) -> str | None:
    """The value that the loaded driver has of one of its options; None when none is loaded."""
    try:
        lines = DRIVER_PARAMETERS.read_text().splitlines()
    except OSError:
        return None
    return dict(line.partition(": ")[::2] for line in lines).get(name)


def power_limits() -> list[str] | None:
    """Watts that each card may draw, in nvidia-smi's words; None when it does not say."""
    answer = command(
        ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits"], GPU_TIMEOUT_S
    )
    return None if answer is None or answer["rc"] != 0 else str(answer["out"]).split()


def machine(wake: str, *, power: bool = False) -> dict[str, Any]:
    """What the machine below the services is: the card's links, driver, waking; `power`: its limit, too."""
    kind = command(["systemd-detect-virt", "--container"])
    said = command(["ethtool", wake]) if wake else None
    on = [
        line.split(":", 1)[1].strip()
        for line in (said or {"out": ""})["out"].splitlines()
        if "Wake-on:" in line
    ]
    try:
        driver = Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        driver = ""
    return {
        "container": bool(kind and kind["rc"] == 0),
        "links": links(),
        "card_set_up": CARD_SET_UP.exists(),
        "driver": driver,
        "uvm": Path("/dev/nvidia-uvm").exists(),
        "suspend": driver_parameter("PreserveVideoMemoryAllocations"),
        "power_limits": power_limits() if power else None,
        "wake_on": on[-1] if on else None,
    }


def read_json(path: str) -> Any:
    """The object in a JSON file, or None."""
    try:
        return as_object(json.loads(Path(path).read_text()))
    except (OSError, ValueError):
        return None


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """Everything that `request` asks for. Without "llm" in it: only what any host can say."""
    seen: dict[str, Any] = {
        "time": time.time(),
        "root": os.geteuid() == 0,
        "system": platform.system(),
        "systemd": Path("/run/systemd/system").is_dir(),
        "failed_units": failed_units(),
        "disk": disk("/"),
        "command_line": command_line(),
        "removed_parameters": removed_parameters(),
    }
    if request.get("client"):
        seen["local_claude"] = command([str(Path(request["client"]["local_claude"]).expanduser()), "--help"])
    if request.get("firewall"):
        seen["firewall"] = firewall(request["firewall"])
    llm = request.get("llm")
    if llm:
        user = llm["user"]
        seen["llm"] = {
            "account": account(user),
            "status": parsed(as_user(user, ["lmswitch", "status", "--json"])),
            "list": parsed(as_user(user, ["lmswitch", "list", "--json"])),
            "presets": read_json(llm["presets_json"]),
            "servers": servers(),
            "user_units": units(llm["user_units"], user),
            "boot_links": boot_links(user),
            "system_units": units(llm["system_units"], None),
            "gateway_units": units(llm["gateway_units"], user),
            "gpu_guard": gpu_guard(user) if llm["gpu_guard"] else None,
            "ports": holders(llm["ports"]),
            "server": server(llm["listen"]),
            "builds": builds(llm["builds_root"], llm["builds"]),
            "files": file_sizes(llm["models_dir"], llm["files"]),
            "disk": disk(llm["models_dir"]),
        }
    if request.get("ocr"):
        seen["ocr"] = ocr_layers(request["ocr"])
    if request.get("machine") is not None:
        seen["machine"] = machine(request["machine"]["wake"], power=request["machine"]["power"])
    if request.get("gpu"):
        seen["gpu"] = gpu()
    return seen
