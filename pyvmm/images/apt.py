"""Debian packages, fetched and unpacked but never installed: no root, no maintainer scripts.

apt chooses, downloads and verifies (signed lists, checksums); ``dpkg-deb -x`` unpacks into the
cache. The system's package lists serve where they know the package; where they are missing, empty
or out of date, lists of pyvmm's own are fetched into the cache from the same sources.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, NamedTuple

from pyvmm.errors import UsageError
from pyvmm.images import cache
from pyvmm.images.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path


class Package(NamedTuple):
    """A package that the machine's apt sources offer; ``version`` is Debian's."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}_{self.version.replace(':', '%3a')}"


def newest(pattern: str) -> Package:
    """The package with the highest numbers in its name of those that match ``pattern`` in full.

    Raises `UsageError` where no apt source offers one.
    """
    expression = re.compile(pattern)
    prefix = re.split(r"[\\.\[(*+]", pattern, maxsplit=1)[0]
    for private in (False, True):
        if private:
            _update_private_lists()
        names = _run("apt-cache", "pkgnames", prefix, private=private).split()
        matching = [name for name in names if expression.fullmatch(name)]
        if matching:
            name = max(matching, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
            return Package(name, _candidate(name, private=private))
    raise UsageError(
        f"no package called {pattern} in this machine's apt sources: add the Debian suite that has "
        "it (for Linux 6.12: bookworm-security, bookworm-backports or trixie)"
    )


def unpacked(package: Package) -> Path:
    """The directory that holds the unpacked files of ``package``; fetched if not cached."""
    return cache.entry(f"packages/{package}", lambda directory: _fetch(package, directory))


def _fetch(package: Package, directory: Path) -> None:
    with Progress(f"fetching {package.name}") as progress:
        try:
            _download(package, directory, progress, private=False)
        except UsageError:
            # The system's lists may name a version that the archive has replaced since.
            _update_private_lists()
            _download(package, directory, progress, private=True)
    for archive in directory.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive, directory], check=True)
        archive.unlink()


def _download(package: Package, directory: Path, progress: Progress, *, private: bool) -> None:
    status, status_writer = os.pipe()
    command = [
        *_command("apt-get", private=private),
        *("-o", f"APT::Status-Fd={status_writer}"),
        *("download", f"{package.name}={package.version}"),
    ]
    with subprocess.Popen(
        command,
        cwd=directory,
        pass_fds=[status_writer],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.close(status_writer)
        with open(status) as lines:
            for line in lines:
                fields = line.split(":")
                if fields[0] == "dlstatus" and len(fields) > 2:
                    progress.update(float(fields[2]) / 100)
        assert process.stderr is not None
        errors = process.stderr.read()
    if process.returncode != 0:
        raise UsageError(f"apt cannot download {package.name}: {_last_line(errors)}")


def _candidate(name: str, *, private: bool) -> str:
    text = _run("apt-cache", "show", "--no-all-versions", name, private=private)
    match = re.search(r"^Version: (.*)$", text, re.MULTILINE)
    if match is None:
        raise UsageError(f"apt knows no version of {name}: run 'apt-get update'")
    return match[1]


@functools.cache
def _update_private_lists() -> None:
    """Once in a process is often enough."""
    with Progress("updating package lists"):
        _run("apt-get", "update", private=True)


def _command(tool: str, *, private: bool) -> list[str]:
    """``tool`` with options that need no root, and private lists if asked."""
    path = shutil.which(tool)
    if path is None:
        raise UsageError(f"{tool} is not installed: pyvmm fetches kernels from Debian packages")
    command = [path, "-q", "-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User="]
    if private:
        state = cache.root() / "apt"
        for part in ("lists/partial", "cache/archives/partial"):
            (state / part).mkdir(parents=True, exist_ok=True)
        command += ["-o", f"Dir::State::lists={state}/lists", "-o", f"Dir::Cache={state}/cache"]
    return command


def _run(tool: str, *arguments: str, private: bool) -> str:
    result = subprocess.run(
        [*_command(tool, private=private), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        raise UsageError(f"{tool} {arguments[0]} failed: {_last_line(result.stderr)}")
    return result.stdout


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("E: ") if lines else "no message"
