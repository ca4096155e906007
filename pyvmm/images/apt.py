"""Debian packages, fetched and unpacked but never installed: no root, no maintainer scripts.

apt chooses, downloads and verifies (signed lists, checksums); ``dpkg-deb -x`` unpacks into the
cache. A package is looked for in three places: in the system's package lists; where those are
missing, empty or out of date, in lists of pyvmm's own from the system's sources; and where these do
not offer it, as on Ubuntu, in Debian itself.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from pyvmm.errors import UsageError
from pyvmm.images import cache
from pyvmm.images.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path


# Debian 12 and 13; between them they have Linux 6.1 and 6.12.
_DEBIAN_SUITES = ("bookworm", "trixie")


class _Lists(Enum):
    """Where apt reads its package lists, in the order in which they are asked."""

    SYSTEM = "system"
    FRESH = "fresh"
    DEBIAN = "debian"


class Package(NamedTuple):
    """A package that the machine's apt sources offer; ``version`` is Debian's."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}_{self.version.replace(':', '%3a')}"


def newest(pattern: str) -> Package:
    """The package with the highest numbers in its name of those that match ``pattern`` in full.

    Raises `UsageError` where neither apt nor Debian offers one.
    """
    expression = re.compile(pattern)
    prefix = re.split(r"[\\.\[(*+]", pattern, maxsplit=1)[0]
    for lists in _Lists:
        _prepare(lists)
        names = _run("apt-cache", "pkgnames", prefix, lists=lists).split()
        matching = [name for name in names if expression.fullmatch(name)]
        if matching:
            name = max(matching, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
            return Package(name, _candidate(name, lists))
    raise UsageError(f"Debian has no package called {pattern}: this version of pyvmm is outdated")


def unpacked(package: Package) -> Path:
    """The directory that holds the unpacked files of ``package``; fetched if not cached."""
    return cache.entry(f"packages/{package}", lambda directory: _fetch(package, directory))


def _fetch(package: Package, directory: Path) -> None:
    with Progress(f"fetching {package.name}") as progress:
        for lists in _Lists:
            try:
                _prepare(lists)
                _download(package, directory, progress, lists)
                break
            except UsageError:
                if lists is _Lists.DEBIAN:
                    raise
    for archive in directory.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive, directory], check=True)
        archive.unlink()


def _download(package: Package, directory: Path, progress: Progress, lists: _Lists) -> None:
    status, status_writer = os.pipe()
    command = [
        *_command("apt-get", lists),
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


def _candidate(name: str, lists: _Lists) -> str:
    text = _run("apt-cache", "show", "--no-all-versions", name, lists=lists)
    match = re.search(r"^Version: (.*)$", text, re.MULTILINE)
    if match is None:
        raise UsageError(f"apt knows no version of {name}: run 'apt-get update'")
    return match[1]


@functools.cache
def _prepare(lists: _Lists) -> None:
    """Fetches ``lists``, unless they are the system's; once in a process is often enough."""
    if lists is _Lists.SYSTEM:
        return
    for part in ("lists/partial", "cache/archives/partial"):
        (_state(lists) / part).mkdir(parents=True, exist_ok=True)
    with Progress(f"updating package lists ({lists.value})"):
        if lists is _Lists.DEBIAN:
            sources = "".join(map(_debian_sources, _DEBIAN_SUITES))
            (_state(lists) / "sources.list").write_text(sources)
        _run("apt-get", "update", lists=lists)


def _debian_sources(suite: str) -> str:
    """What mmdebstrap would put into ``sources.list``: it knows Debian's archive and its keys."""
    if shutil.which("mmdebstrap") is None:
        raise UsageError(
            "this machine's apt sources lack what pyvmm needs (Linux 6.12: bookworm-security or "
            "trixie): apt install mmdebstrap debian-archive-keyring, and Debian itself is asked"
        )
    with tempfile.NamedTemporaryFile("r") as file:
        command = ["mmdebstrap", "--variant=custom", "--skip=update", "--format=null"]
        command += [f'--setup-hook=cat "$1/etc/apt/sources.list" >{file.name}', suite]
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            raise UsageError(f"mmdebstrap {suite} failed: {_last_line(result.stderr)}")
        return file.read()


def _state(lists: _Lists) -> Path:
    return cache.root() / "apt" / lists.value


def _command(tool: str, lists: _Lists) -> list[str]:
    """``tool`` with options that need no root, and with the package lists that it shall use."""
    path = shutil.which(tool)
    if path is None:
        raise UsageError(f"{tool} is not installed: pyvmm fetches kernels from Debian packages")
    options = ["Debug::NoLocking=1", "APT::Sandbox::User="]
    if lists is not _Lists.SYSTEM:
        state = _state(lists)
        options += [f"Dir::State::lists={state}/lists", f"Dir::Cache={state}/cache"]
    if lists is _Lists.DEBIAN:
        options += [f"Dir::Etc::sourcelist={state}/sources.list", "Dir::Etc::sourceparts=/dev/null"]
    return [path, "-q", *(word for option in options for word in ("-o", option))]


def _run(tool: str, *arguments: str, lists: _Lists) -> str:
    result = subprocess.run(
        [*_command(tool, lists), *arguments],
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
