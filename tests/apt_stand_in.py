"""A signed apt repository of packages that stand in for a vendor's: nothing of the vendor's is in it."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping
from pathlib import Path

NOBODY = "stand-in <stand-in@example.invalid>"
TIMEOUT_S = 60


class AptRepository:
    """`folder/repository`, laid out as vendors do (dists/SUITE/main), signed with a key of its own."""

    def __init__(self, folder: Path, suite: str) -> None:
        self.folder, self.home, self.suite = folder / "repository", folder / "gnupg", suite
        self.folder.mkdir(parents=True)
        self.home.mkdir(mode=0o700)
        self._gpg("--quick-gen-key", NOBODY, "ed25519", "sign", "never")
        self.key = self._gpg("--export")
        (self.folder / f"{suite}.noarmor.gpg").write_bytes(self.key)

    @property
    def key_sha256(self) -> str:
        """Of the key's file."""
        return hashlib.sha256(self.key).hexdigest()

    def package(self, name: str, version: str, files: Mapping[str, str], depends: str = "") -> None:
        """Add a package; what lies in a bin folder is executable."""
        root = self.folder.parent / "build" / f"{name}_{version}"
        (root / "DEBIAN").mkdir(parents=True)
        (root / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: {NOBODY}\n"
            + (f"Depends: {depends}\n" if depends else "")
            + "Description: stands in for the vendor's package in tests\n"
        )
        for path, text in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
            (root / path).chmod(0o755 if "bin/" in path else 0o644)
        target = self.folder / f"{name}_{version}_all.deb"
        _run("dpkg-deb", "--root-owner-group", "-Zgzip", "--build", str(root), str(target))

    def sign(self) -> None:
        """List the packages, and sign the list."""
        listed = "".join(self._entry(file) for file in sorted(self.folder.glob("*.deb")))
        release = self.folder / "dists" / self.suite
        lines = ""
        for name in ("main/binary-amd64/Packages", "main/binary-arm64/Packages"):
            (release / name).parent.mkdir(parents=True, exist_ok=True)
            (release / name).write_text(listed)
            lines += f" {hashlib.sha256(listed.encode()).hexdigest()} {len(listed.encode())} {name}\n"
        (release / "Release").write_text(
            f"Origin: stand-in\nSuite: {self.suite}\nCodename: {self.suite}\nComponents: main\n"
            f"Architectures: amd64 arm64\nDate: Sat, 28 Nov 2026 00:00:00 UTC\nSHA256:\n{lines}"
        )
        (release / "InRelease").unlink(missing_ok=True)
        self._gpg("--clearsign", "--output", str(release / "InRelease"), str(release / "Release"))

    def _entry(self, file: Path) -> str:
        control = _run("dpkg-deb", "--field", str(file)).decode()
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        return f"{control}Filename: {file.name}\nSize: {len(content)}\nSHA256: {digest}\n\n"

    def _gpg(self, *words: str) -> bytes:
        return _run("gpg", "--homedir", str(self.home), "--batch", "--quiet", "--passphrase", "", *words)


def _run(*argv: str) -> bytes:
    return subprocess.run(argv, capture_output=True, check=True, timeout=TIMEOUT_S).stdout
