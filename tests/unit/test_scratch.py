"""Throw-away copies of disk images."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.images.scratch import scratch_copy

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """8 MiB: data, a hole, data, and a hole at the end."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(b"a" * MIB)
        file.seek(4 * MIB)
        file.write(b"b" * MIB)
        file.truncate(8 * MIB)
    return path


def test_it_has_the_contents_and_the_holes(image: Path) -> None:
    with scratch_copy(str(image)) as copy:
        assert Path(copy).read_bytes() == image.read_bytes()
        assert Path(copy).stat().st_blocks * 512 <= 2 * MIB + 65536


def test_writing_to_it_changes_nothing_else_and_it_leaves_nothing(image: Path) -> None:
    before = image.read_bytes()
    with scratch_copy(str(image)) as copy:
        with Path(copy).open("r+b") as file:
            file.write(b"x" * MIB)
        assert image.read_bytes() == before
        assert list(image.parent.iterdir()) == [image]
    assert not Path(copy).exists()


def test_an_image_without_data(tmp_path: Path) -> None:
    path = tmp_path / "empty.img"
    with path.open("wb") as file:
        file.truncate(MIB)
    with scratch_copy(str(path)) as copy:
        assert Path(copy).read_bytes() == bytes(MIB)
