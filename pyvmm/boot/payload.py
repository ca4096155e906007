"""Unpacks the vmlinux inside a bzImage: every compression that an x86 kernel can be built with.

The build appends the unpacked length, 4 bytes little-endian, to each format except gzip, which ends
with it anyway (Linux, scripts/Makefile.lib, ``size_append``).
"""

from __future__ import annotations

import ctypes
import mmap
import struct

from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class _Decompressor(Protocol):
        @property
        def eof(self) -> bool: ...
        def decompress(self, data: memoryview, /) -> bytes: ...


_LENGTH_SIZE = 4
_MAX_UNPACKED = 1 << 30  # no kernel comes near it: a larger length is not a length
_INPUT_CHUNK = 64 << 10
_LZ4_LEGACY_MAGIC = 0x184C2102

# lzop's file format: flags of its header that say which checksums are in each block.
_LZO_MAGIC = b"\x89LZO\x00\r\n\x1a\n"
_LZO_ADLER32_UNPACKED = 0x0001
_LZO_ADLER32_PACKED = 0x0002
_LZO_CRC32_UNPACKED = 0x0100
_LZO_CRC32_PACKED = 0x0200
_LZO_FILTER = 0x0800


class _Corrupt(Exception):
    """The compressed data is not what its header says."""


class _MissingLibrary(Exception):
    """The shared library for a format is not installed."""

    def __init__(self, soname: str, package: str) -> None:
        super().__init__(soname)
        self.soname = soname
        self.package = package


def unpack(payload: bytearray, path: str) -> mmap.mmap:
    """The unpacked contents of ``payload``, the compressed part of the bzImage at ``path``.

    Raises UsageError when it is corrupt or compressed in a way that this machine cannot undo.
    """
    name, unpacker = _format_of(payload, path)
    size = int.from_bytes(payload[-_LENGTH_SIZE:], "little")
    try:
        if not 0 < size <= _MAX_UNPACKED:
            raise _Corrupt
        output = mmap.mmap(-1, size)
        if unpacker(payload, output) != size:
            raise _Corrupt
        return output
    except _Corrupt:
        raise UsageError(
            f"kernel '{path}' is corrupt: its {name} payload cannot be unpacked"
        ) from None
    except _MissingLibrary as missing:
        raise UsageError(
            f"kernel '{path}' is compressed with {name}, and {missing.soname} is not installed:"
            f" install {missing.package}, or let the guest unpack it with --boot=bzimage"
        ) from None


def _format_of(payload: bytearray, path: str) -> tuple[str, Callable[[bytearray, mmap.mmap], int]]:
    """The name of the compression and the function that undoes it."""
    for magic, name, unpacker in (
        (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
        (_LZ4_LEGACY_MAGIC.to_bytes(4, "little"), "lz4", _lz4),
        (b"\x1f\x8b", "gzip", _gzip),
        (b"\xfd7zXZ\x00", "xz", _xz),
        (b"BZh", "bzip2", _bzip2),
        (_LZO_MAGIC, "lzo", _lzo),
        (b"\x5d\x00\x00", "lzma", _lzma),
    ):
        if payload.startswith(magic):
            return name, unpacker
    raise UsageError(
        f"kernel '{path}' is compressed in an unknown way: let the guest unpack it with"
        " --boot=bzimage"
    )


# Each unpacker fills `output` and returns the number of bytes it put there.


def _gzip(payload: bytearray, output: mmap.mmap) -> int:
    import zlib

    return _stream(zlib.decompressobj(31), zlib.error, payload, output)


def _xz(payload: bytearray, output: mmap.mmap) -> int:
    import lzma

    return _stream(lzma.LZMADecompressor(lzma.FORMAT_XZ), lzma.LZMAError, payload, output)


def _lzma(payload: bytearray, output: mmap.mmap) -> int:
    import lzma

    return _stream(lzma.LZMADecompressor(lzma.FORMAT_ALONE), lzma.LZMAError, payload, output)


def _bzip2(payload: bytearray, output: mmap.mmap) -> int:
    import bz2

    return _stream(bz2.BZ2Decompressor(), OSError, payload, output)


def _stream(
    decompressor: _Decompressor, error: type[Exception], payload: bytearray, output: mmap.mmap
) -> int:
    written = 0
    packed = memoryview(payload)
    for start in range(0, len(packed), _INPUT_CHUNK):
        if decompressor.eof:
            break
        try:
            data = decompressor.decompress(packed[start : start + _INPUT_CHUNK])
        except error:
            raise _Corrupt from None
        if len(data) > len(output) - written:
            raise _Corrupt
        output[written : written + len(data)] = data
        written += len(data)
    return written if decompressor.eof else 0


def _library(soname: str, package: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(soname)
    except OSError:
        raise _MissingLibrary(soname, package) from None


def _address(buffer: bytearray | mmap.mmap) -> int:
    """Where a buffer starts; valid while the caller holds the buffer and does not resize it."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _zstd(payload: bytearray, output: mmap.mmap) -> int:
    zstd = _library("libzstd.so.1", "libzstd1")
    decompress = zstd.ZSTD_decompress
    decompress.restype = ctypes.c_size_t
    decompress.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t)
    # One call for the whole frame: the output is the window, so that the 128 MiB window of
    # `zstd --ultra -22` costs no memory.
    written: int = decompress(
        _address(output), len(output), _address(payload), len(payload) - _LENGTH_SIZE
    )
    return written  # an error code is near 2^64, and thus never the expected length


def _lz4(payload: bytearray, output: mmap.mmap) -> int:
    """The legacy frame of ``lz4 -l``: blocks of up to 8 MiB, each after its packed length."""
    decompress = _library("liblz4.so.1", "liblz4-1").LZ4_decompress_safe
    decompress.restype = ctypes.c_int
    decompress.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    source, destination = _address(payload), _address(output)
    position, written, end = 4, 0, len(payload) - _LENGTH_SIZE
    while position + 4 <= end:
        (size,) = struct.unpack_from("<I", payload, position)
        position += 4
        if size == _LZ4_LEGACY_MAGIC:  # frames may follow each other
            continue
        if size > end - position:
            raise _Corrupt
        block = decompress(source + position, destination + written, size, len(output) - written)
        if block < 0:
            raise _Corrupt
        position += size
        written += block
    return written


def _lzo(payload: bytearray, output: mmap.mmap) -> int:
    """A file of ``lzop``; its checksums are skipped, as the kernel's own unpacker does."""
    decompress = _library("liblzo2.so.2", "liblzo2-2").lzo1x_decompress_safe
    decompress.restype = ctypes.c_int
    decompress.argtypes = (
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_ulong),
        ctypes.c_void_p,
    )
    source, destination = _address(payload), _address(output)
    try:
        flags, position = _lzo_header(payload)
        per_unpacked = 4 * bool(flags & _LZO_ADLER32_UNPACKED) + 4 * bool(
            flags & _LZO_CRC32_UNPACKED
        )
        per_packed = 4 * bool(flags & _LZO_ADLER32_PACKED) + 4 * bool(flags & _LZO_CRC32_PACKED)
        written = 0
        while True:
            (unpacked,) = struct.unpack_from(">I", payload, position)
            if unpacked == 0:
                return written
            (packed,) = struct.unpack_from(">I", payload, position + 4)
            position += 8 + per_unpacked
            if packed < unpacked:
                position += per_packed
            if packed > len(payload) - position or unpacked > len(output) - written:
                raise _Corrupt
            if packed == unpacked:  # incompressible: stored as it is
                output[written : written + unpacked] = payload[position : position + packed]
            else:
                block = ctypes.c_ulong(unpacked)
                result = decompress(
                    source + position, packed, destination + written, ctypes.byref(block), None
                )
                if result != 0 or block.value != unpacked:
                    raise _Corrupt
            position += packed
            written += unpacked
    except (struct.error, IndexError):
        raise _Corrupt from None


def _lzo_header(payload: bytearray) -> tuple[int, int]:
    """The flags of the header of an lzop file, and where its first block starts."""
    position = len(_LZO_MAGIC)
    (version,) = struct.unpack_from(">H", payload, position)
    # version, library version, [version needed], method, [level]
    position += 2 + 2 + (2 if version >= 0x0940 else 0) + 1 + (1 if version >= 0x0940 else 0)
    (flags,) = struct.unpack_from(">I", payload, position)
    # flags, [filter], mode, time, [time's upper half], name, header checksum
    position += 4 + (4 if flags & _LZO_FILTER else 0) + 4 + 4 + (4 if version >= 0x0940 else 0)
    position += 1 + payload[position] + 4
    return flags, position
