"""Every compression of a bzImage's payload, whole and damaged."""

from __future__ import annotations

import bz2
import ctypes
import functools
import gzip
import lzma
import random
import shutil
import struct
import subprocess

import pytest
from support.kernel_images import with_length

from pyvmm.boot import payload
from pyvmm.errors import UsageError

# Compressible, and larger than a block of lzop (256 KiB) and than the chunks that are fed.
DATA = random.Random(1).randbytes(4096) * 70 + b"the end"


@functools.cache
def compress_with(*command: str) -> bytes:
    """DATA through a program, or a skipped test where it is not installed."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"the program {command[0]} is not installed")
    return subprocess.run(command, input=DATA, stdout=subprocess.PIPE, check=True).stdout


def zstd() -> bytes:
    # The window of the kernel's build; input from a pipe: the frame does not tell its size.
    return compress_with("zstd", "-1", "--long=27", "-c") + struct.pack("<I", len(DATA))


def lz4() -> bytes:
    return compress_with("lz4", "-l", "-9", "-c") + struct.pack("<I", len(DATA))


def lzo() -> bytes:
    try:
        ctypes.CDLL("liblzo2.so.2")
    except OSError:
        pytest.skip("liblzo2 is not installed")
    return compress_with("lzop", "-9", "-c") + struct.pack("<I", len(DATA))


def xz() -> bytes:
    # scripts/xz_wrap.sh of the kernel.
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 32 << 20}]
    packed = lzma.compress(DATA, check=lzma.CHECK_CRC32, filters=filters)
    return packed + struct.pack("<I", len(DATA))


FORMATS = {
    "gzip": lambda: gzip.compress(DATA),
    "xz": xz,
    "lzma": lambda: with_length(lambda d: lzma.compress(d, lzma.FORMAT_ALONE), DATA),
    "bzip2": lambda: with_length(bz2.compress, DATA),
    "zstd": zstd,
    "lz4": lz4,
    "lzo": lzo,
}


@pytest.fixture(params=FORMATS)
def packed(request: pytest.FixtureRequest) -> bytearray:
    return bytearray(FORMATS[request.param]())


def test_unpacks(packed: bytearray) -> None:
    assert payload.unpack(packed, "k")[:] == DATA


def test_cut_short(packed: bytearray) -> None:
    cut = packed[: len(packed) // 2] + packed[-4:]
    with pytest.raises(UsageError, match=r"kernel 'k' is corrupt: its \w+ payload"):
        payload.unpack(cut, "k")


@pytest.mark.parametrize("claimed", [len(DATA) - 1, len(DATA) + 1, 0, 0xFFFF_FFFF])
def test_wrong_length(packed: bytearray, claimed: int) -> None:
    packed[-4:] = struct.pack("<I", claimed)
    with pytest.raises(UsageError, match="corrupt"):
        payload.unpack(packed, "k")


def test_flipped_bits_never_do_harm(packed: bytearray) -> None:
    """Formats without a checksum may not notice, but nothing else than UsageError may come."""
    rng = random.Random(2)
    for _ in range(40):
        damaged = bytearray(packed)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(16, len(packed) - 4)] ^= 1 << rng.randrange(8)
        try:
            payload.unpack(damaged, "k")
        except UsageError as error:
            assert "corrupt" in str(error)


def test_stored_block_of_lzo() -> None:
    """lzop stores what does not become smaller."""
    try:
        ctypes.CDLL("liblzo2.so.2")
    except OSError:
        pytest.skip("liblzo2 is not installed")
    header = b"\x89LZO\x00\r\n\x1a\n" + struct.pack(
        ">HHHBBIIIIB", *[0x1040, 0, 0, 1, 9], 0, 0, 0, 0, 0
    )
    packed = header + bytes(4) + struct.pack(">II", 6, 6) + b"stored" + bytes(4)
    assert payload.unpack(bytearray(with_length(lambda _: packed, b"stored")), "k")[:] == b"stored"


def test_unknown_format() -> None:
    with pytest.raises(UsageError, match=r"unknown way.*--boot=bzimage"):
        payload.unpack(bytearray(b"neither of them\0\0\0\0"), "k")


@pytest.mark.parametrize(
    ("magic", "package"),
    [
        (b"\x28\xb5\x2f\xfd", "libzstd1"),
        (b"\x02\x21\x4c\x18", "liblz4-1"),
        (b"\x89LZO\0\r\n\x1a\n", "liblzo2-2"),
    ],
)
def test_missing_library(magic: bytes, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(soname: str) -> None:
        raise OSError(f"{soname}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", not_found)
    with pytest.raises(UsageError, match=f"install {package}, or .*--boot=bzimage"):
        payload.unpack(bytearray(magic + bytes(32) + b"\1\0\0\0"), "k")
