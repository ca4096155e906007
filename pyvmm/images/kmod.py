"""Kernel modules of an unpacked Debian kernel package: where they are and what they need."""

from __future__ import annotations

import lzma
import re
from typing import TYPE_CHECKING, NamedTuple

from pyvmm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class Module(NamedTuple):
    """A module ready to be loaded: ``data`` is the uncompressed ELF file."""

    name: str
    data: bytes
    depends: tuple[str, ...]
    aliases: tuple[str, ...]

    @property
    def file(self) -> str:
        return f"{self.name}.ko"


class Modules:
    """The modules below ``package`` (an unpacked linux-image package).

    Names are as in ``lsmod``: with underscores. Packages carry no ``modules.dep``, which depmod
    writes at installation, so dependencies are read from each module's ``.modinfo``.
    """

    def __init__(self, package: Path) -> None:
        directories = [*package.glob("lib/modules/*"), *package.glob("usr/lib/modules/*")]
        if len(directories) != 1:
            raise UsageError(f"{package} holds no kernel modules: delete it to fetch it again")
        self.directory = directories[0]
        self.release = self.directory.name
        self._paths = {
            _name_of(path): path
            for path in self.directory.glob("kernel/**/*.ko*")
            if path.suffix in (".ko", ".xz")
        }
        builtin = (self.directory / "modules.builtin").read_text().split()
        self._builtin = {_name_of(self.directory / line) for line in builtin}
        self._loaded: dict[str, Module] = {}

    def is_builtin(self, name: str) -> bool:
        return name in self._builtin

    def read(self, name: str) -> Module:
        """Raises `UsageError` if the kernel has no module ``name``."""
        if name not in self._loaded:
            path = self._paths.get(name)
            if path is None:
                raise UsageError(f"the kernel {self.release} has no module {name}")
            data = path.read_bytes()
            if path.suffix == ".xz":
                data = lzma.decompress(data)
            depends = [d.replace("-", "_") for d in _modinfo(data, "depends") if d]
            depends = [name for line in depends for name in line.split(",")]
            self._loaded[name] = Module(name, data, tuple(depends), tuple(_modinfo(data, "alias")))
        return self._loaded[name]

    def dependencies(self, name: str) -> list[str]:
        """All that ``name`` needs, itself left out, in the order of ``modules.dep``: the last is
        loaded first."""
        return [module.name for module in reversed(self.with_dependencies([name])[:-1])]

    def with_dependencies(self, names: Iterable[str]) -> list[Module]:
        """The modules ``names`` and all that they need, each after what it depends on.

        A name that is built into the kernel is left out.
        """
        ordered: dict[str, Module] = {}

        def visit(name: str) -> None:
            if name in ordered or self.is_builtin(name):
                return
            module = self.read(name)
            for dependency in module.depends:
                visit(dependency)
            ordered[name] = module

        for name in names:
            visit(name)
        return list(ordered.values())


def _name_of(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")


def _modinfo(data: bytes, key: str) -> list[str]:
    """The values of ``key`` in the ``.modinfo`` section: NUL-terminated ``key=value`` strings."""
    pattern = rb"\0" + key.encode() + rb"=([^\0]*)(?=\0)"
    return [match.decode() for match in re.findall(pattern, data)]
