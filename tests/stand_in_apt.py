"""A signed apt repository of packages that stand in for a vendor's: nothing of the vendor's is in it."""

from __future__ import annotations

import base64
import hashlib
import io
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

from lab import config, packages

NOBODY = "stand-in <stand-in@example.invalid>"
TIMEOUT_S = 60
ARCHITECTURES = ("amd64", "arm64")


class AptRepository:
    """`folder/repository`, signed with a key of its own.

    With a suite it is laid out as dists/SUITE/main, without one it is flat; vendors do either.
    """

    def __init__(self, folder: Path, suite: str = "") -> None:
        packages.ensure(config.from_environment(), {"gpg": "gpg", "dpkg-deb": "dpkg"})
        self.folder, self.home, self.suite = folder / "repository", folder / "gnupg", suite
        self.folder.mkdir(parents=True)
        self.home.mkdir(mode=0o700)
        self._gpg("--quick-gen-key", NOBODY, "ed25519", "sign", "never")
        listed = self._gpg("--with-colons", "--list-keys").decode()
        self.fingerprint = next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr:"))
        self.key = self._gpg("--export")

    @property
    def key_sha256(self) -> str:
        """Of the key's file."""
        return hashlib.sha256(self.key).hexdigest()

    def armoured_key(self) -> bytes:
        """The key as text."""
        return self._gpg("--armor", "--export")

    def package(
        self, name: str, version: str, files: Mapping[str, str] | None = None, depends: str = ""
    ) -> None:
        """Add a package; what lies in a bin folder is executable."""
        root = self.folder.parent / "build" / f"{name}_{version}"
        (root / "DEBIAN").mkdir(parents=True)
        (root / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: {NOBODY}\n"
            + (f"Depends: {depends}\n" if depends else "")
            + "Description: stands in for the vendor's package in tests\n"
        )
        for path, text in (files or {}).items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
            (root / path).chmod(0o755 if "bin/" in path else 0o644)
        target = self.folder / f"{name}_{version}_all.deb"
        _run("dpkg-deb", "--root-owner-group", "-Zgzip", "--build", str(root), str(target))

    def sign(self) -> None:
        """List the packages, and sign the list."""
        listed = "".join(self._entry(file) for file in sorted(self.folder.glob("*.deb"))).encode()
        release, names, about = self.folder, ["Packages"], ""
        if self.suite:
            release = self.folder / "dists" / self.suite
            names = [f"main/binary-{architecture}/Packages" for architecture in ARCHITECTURES]
            about = (
                f"Suite: {self.suite}\nCodename: {self.suite}\nComponents: main\n"
                f"Architectures: {' '.join(ARCHITECTURES)}\n"
            )
        for name in names:
            (release / name).parent.mkdir(parents=True, exist_ok=True)
            (release / name).write_bytes(listed)
        sums = "".join(f" {hashlib.sha256(listed).hexdigest()} {len(listed)} {name}\n" for name in names)
        (release / "Release").write_text(
            f"Origin: stand-in\nLabel: stand-in\n{about}Date: Sat, 28 Nov 2026 00:00:00 UTC\nSHA256:\n{sums}"
        )
        (release / "InRelease").unlink(missing_ok=True)
        self._gpg("--clearsign", "--output", str(release / "InRelease"), str(release / "Release"))

    def packed(self) -> str:
        """All of it, as base64 of a compressed tar archive."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            archive.add(self.folder, arcname=".")
        return base64.b64encode(packed.getvalue()).decode()

    def _entry(self, file: Path) -> str:
        control = _run("dpkg-deb", "--field", str(file)).decode()
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        return f"{control}Filename: ./{file.name}\nSize: {len(content)}\nSHA256: {digest}\n\n"

    def _gpg(self, *words: str) -> bytes:
        try:
            return _run("gpg", "--homedir", str(self.home), "--batch", "--quiet", "--passphrase", "", *words)
        finally:  # the agent that it has started would outlive the test
            _run("gpgconf", "--homedir", str(self.home), "--kill", "all")


def _run(*argv: str) -> bytes:
    return subprocess.run(argv, capture_output=True, check=True, timeout=TIMEOUT_S).stdout
