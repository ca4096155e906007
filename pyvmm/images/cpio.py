"""An initramfs: a cpio archive in the "newc" format (kernel: driver-api/early-userspace)."""

from __future__ import annotations

import stat


class Archive:
    """Collects files in memory; `to_bytes` gives the archive, uncompressed.

    Everything belongs to root and has time stamp 0, so equal content gives equal bytes.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._directories: set[str] = set()

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self._parents(name)
        self._add(name, stat.S_IFREG | mode, data)

    def symlink(self, name: str, target: str) -> None:
        self._parents(name)
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def directory(self, name: str, mode: int = 0o755) -> None:
        if name not in self._directories:
            self._parents(name)
            self._directories.add(name)
            self._add(name, stat.S_IFDIR | mode, b"")

    def to_bytes(self) -> bytes:
        return b"".join([*self._parts, self._member("TRAILER!!!", 0, b"", 0)])

    def _parents(self, name: str) -> None:
        parent = name.rpartition("/")[0]
        if parent:
            self.directory(parent)

    def _add(self, name: str, mode: int, data: bytes) -> None:
        self._parts.append(self._member(name, mode, data, len(self._parts) + 1))

    @staticmethod
    def _member(name: str, mode: int, data: bytes, inode: int) -> bytes:
        encoded = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
        return header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4)
