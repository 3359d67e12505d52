"""A signed apt repository of empty packages that stand in for NVIDIA's: same names and dependencies."""

from __future__ import annotations

import base64
import hashlib
import io
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

from lab import config, packages
from tests.support import Run

AsRoot = Callable[[str, str], Run]
SERVED = "http://127.0.0.1:8099/"
STAND_INS = "nvidia-open nvidia-driver-open nvidia-modprobe cuda-toolkit-13-0 cuda-nvcc-13-0"

NOBODY = "stand-in <stand-in@example.invalid>"
# Name, version, dependencies. As the vendor's do, these ask for "this version or a later one" of each other.
DRIVERS = ("580.1-1ubuntu1", "580.2-1ubuntu1", "595.1-1ubuntu1")
TOOLKITS = ("13.0.2-1", "13.0.3-1")
# Higher than the distribution's: what nobody asked this repository for must not come from it.
DECOY = ("dash", "99.0-1")
# What a service of the driver's does on a machine without a card.
UNIT = (
    "[Unit]\nDescription=Stand-in of {name}\n"
    "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n{install}"
)
SERVICES = {
    "nvidia-persistenced.service": "[Install]\nWantedBy=multi-user.target\n",
    "nvidia-suspend.service": "[Install]\nWantedBy=systemd-suspend.service\n",
    "nvidia-resume.service": "[Install]\nWantedBy=systemd-suspend.service\n",
    "nvidia-hibernate.service": "[Install]\nWantedBy=systemd-hibernate.service\n",
}


class Repository:
    """A flat repository in `folder`, signed with a key of its own."""

    @classmethod
    def make(cls, folder: Path) -> Repository:
        """Build it; what that takes is installed here when it is missing."""
        packages.ensure(config.from_environment(), {"gpg": "gpg", "dpkg-deb": "dpkg"})
        return cls(folder)

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder / "repository", folder / "gnupg"
        self.folder.mkdir(parents=True)
        self.home.mkdir(mode=0o700)
        self._gpg("--quick-gen-key", NOBODY, "ed25519", "sign", "never")
        listed = self._gpg("--with-colons", "--list-keys").decode()
        self.fingerprint = next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr:"))
        (self.folder / "key.asc").write_bytes(self._gpg("--armor", "--export"))
        for version in DRIVERS:
            self._package("nvidia-open", version, f"nvidia-driver-open (>= {version})")
            self._package("nvidia-driver-open", version, files=_services())
            self._package(
                "nvidia-modprobe", version, files={"usr/bin/nvidia-modprobe": "#!/bin/sh\nexit 0\n"}
            )
        for version in TOOLKITS:
            self._package("cuda-toolkit-13-0", version, "cuda-nvcc-13-0")
        self._package("cuda-nvcc-13-0", "13.0.88-1")
        self._package(*DECOY)
        self.sign()

    def sign(self) -> None:
        """List what is there, and sign the list."""
        packages = "".join(self._entry(file) for file in sorted(self.folder.glob("*.deb")))
        (self.folder / "Packages").write_text(packages)
        digest = hashlib.sha256(packages.encode()).hexdigest()
        (self.folder / "Release").write_text(
            "Origin: stand-in\nLabel: stand-in\nDate: Sat, 28 Nov 2026 00:00:00 UTC\n"
            f"SHA256:\n {digest} {len(packages.encode())} Packages\n"
        )
        (self.folder / "InRelease").unlink(missing_ok=True)
        self._gpg("--clearsign", "--output", str(self.folder / "InRelease"), str(self.folder / "Release"))

    def lay_out(self, as_root: AsRoot) -> None:
        """Copy it to a host."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            archive.add(self.folder, arcname=".")
        command = (
            "rm -rf /srv/stand-in && mkdir -p /srv/stand-in && cd /srv/stand-in &&"
            " base64 -d | tar -xz --no-same-owner && chmod -R a+rX ."
        )
        as_root(command, base64.b64encode(packed.getvalue()).decode()).check()

    def _package(
        self, name: str, version: str, depends: str = "", files: dict[str, str] | None = None
    ) -> None:
        root = self.folder.parent / "build" / f"{name}_{version}"
        (root / "DEBIAN").mkdir(parents=True)
        (root / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: {NOBODY}\n"
            + (f"Depends: {depends}\n" if depends else "")
            + "Description: Empty package that stands in for the vendor's in tests\n"
        )
        for path, text in (files or {}).items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
            (root / path).chmod(0o755 if "/bin/" in path else 0o644)
        target = self.folder / f"{name}_{version}_all.deb"
        _run("dpkg-deb", "--root-owner-group", "-Zgzip", "--build", str(root), str(target))

    def _entry(self, file: Path) -> str:
        control = _run("dpkg-deb", "--field", str(file)).decode()
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        return f"{control}Filename: ./{file.name}\nSize: {len(content)}\nSHA256: {digest}\n\n"

    def _gpg(self, *words: str) -> bytes:
        return _run("gpg", "--homedir", str(self.home), "--batch", "--quiet", "--passphrase", "", *words)


def serve(as_root: AsRoot) -> None:
    """Serve on the host, to the host, what was laid out there."""
    as_root(
        "systemd-run --quiet --unit=stand-in python3 -m http.server"
        " --directory /srv/stand-in --bind 127.0.0.1 8099 &&"
        ' echo "Acquire::http::Proxy::127.0.0.1 DIRECT;" > /etc/apt/apt.conf.d/99stand-in',
        "",
    ).check()


def take_away(as_root: AsRoot) -> None:
    """Leave nothing of it on the host, nor of a run that was broken off."""
    as_root(
        f"systemctl stop stand-in; apt-mark unhold base-files {STAND_INS}; dpkg --purge {STAND_INS};"
        " rm -rf /srv/stand-in /etc/apt/apt.conf.d/99stand-in /etc/apt/*/llmbox-nvidia*"
        " /var/lib/apt/lists/127.0.0.1*",
        "",
    )


def _services() -> dict[str, str]:
    return {
        f"lib/systemd/system/{name}": UNIT.format(name=name, install=install)
        for name, install in SERVICES.items()
    }


def _run(*argv: str) -> bytes:
    return subprocess.run(argv, capture_output=True, check=True, timeout=60).stdout
