"""Disks behind an NBD server: that of a user, or one that pyvmm keeps for an image format."""

from __future__ import annotations

from pyvmm._core import ffi as core_ffi
from pyvmm.backends.disk import PAGE_SIZE, SECTOR, Image
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# A server that says nothing for so long while requests wait for it is taken for dead.
ANSWER_SECONDS = 30.0

_ERROR_SIZE = 512


class NbdError(Exception):
    """The server cannot be used as it was asked to; the message says why, in libnbd's words."""


class NbdImage(Image):
    """The export that `uri` names, as a disk for as many as `threads` threads.

    See ``_native/blk_nbd.h`` for what happens when the server goes. UsageError when the export
    has an impossible size, is read-only but not to be so, or can serve one thread only; NbdError
    when it cannot be reached at all.
    """

    __slots__ = ("_lib", "_nbd")

    def __init__(self, uri: str, *, name: str, readonly: bool = False, threads: int = 1) -> None:
        ffi, self._lib = _library()
        self.name = name
        self.format = "nbd"
        self.readonly = readonly
        info = ffi.new("struct blk_nbd_info *")
        error = ffi.new("char[]", _ERROR_SIZE)
        self._nbd = self._lib.blk_nbd_open(
            uri.encode(), int(ANSWER_SECONDS * 1000), info, error, _ERROR_SIZE
        )
        if self._nbd == ffi.NULL:
            self._nbd = None
            raise NbdError(ffi.string(error).decode(errors="replace"))
        try:
            self._check(info, threads)
        except BaseException:
            self.close()
            raise
        self.logical_block_size = max(SECTOR, info.minimum_block)
        self.physical_block_size = max(PAGE_SIZE, self.logical_block_size)
        self.discard_granularity = self.physical_block_size if info.trim and not readonly else 0
        remote = int(ffi.cast("uintptr_t", self._lib.blk_nbd_remote(self._nbd)))
        self.native = core_ffi.new(
            "struct blk_image *",
            {
                "fd": -1,
                "size": info.size,
                "block_size": self.logical_block_size,
                "buffer_align": 1,
                "one_buffer": True,
                "no_fua": not info.fua,
                "remote": core_ffi.cast("struct blk_remote *", remote),
            },
        )

    def _check(self, info: Any, threads: int) -> None:
        block = max(SECTOR, info.minimum_block)
        if info.readonly and not self.readonly:
            raise UsageError(
                f"the NBD server offers {self.name} for reading alone: "
                "give readonly=on or snapshot=on"
            )
        if info.size <= 0:
            raise UsageError(f"the NBD export {self.name} is empty")
        if block > PAGE_SIZE or info.size % block:
            raise UsageError(
                f"the NBD export {self.name} has {info.size} bytes in blocks of {block}: "
                f"a disk has whole blocks of {SECTOR} to {PAGE_SIZE} bytes"
            )
        if threads > 1 and not info.multi_conn:
            raise UsageError(
                f"the NBD server of {self.name} does not keep several connections consistent "
                "(NBD_FLAG_CAN_MULTI_CONN): give queues=1"
            )

    def close(self) -> None:
        if self._nbd is not None:
            self._lib.blk_nbd_close(self._nbd)
            self._nbd = None


def open_nbd(uri: str, *, readonly: bool = False, threads: int = 1) -> NbdImage:
    """The disk of a user's NBD server. UsageError."""
    if uri.startswith("nbds") and not _library()[1].blk_nbd_has_tls():
        raise UsageError(f"nbd={uri} asks for TLS, which this libnbd was built without")
    try:
        return NbdImage(uri, name=uri, readonly=readonly, threads=threads)
    except NbdError as error:
        raise UsageError(
            f"the NBD server of {uri} cannot be used ({error}): "
            f"check that it runs and offers that export (nbdinfo --list {uri})"
        ) from None


def _library() -> tuple[Any, Any]:
    try:
        from pyvmm._nbd import ffi, lib
    except ImportError:
        raise UsageError(
            "NBD and image formats other than raw need libnbd, which this pyvmm was built "
            "without: install libnbd-dev and run scripts/setup"
        ) from None
    return ffi, lib
