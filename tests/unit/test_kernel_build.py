"""Kernels from source: what is checked before minutes are spent, and what is built again."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from pyvmm.errors import UsageError
from pyvmm.images import kernel_build
from pyvmm.images.apt import Package

PACKAGE = Package("linux-source-9.9", "9.9-1")

# A kernel's Makefile, as far as the build looks at it: `allnoconfig` takes what is asked for, less
# the options that this kernel does not know.
MAKEFILE = """\
allnoconfig:
	grep -v UNKNOWN $(KCONFIG_ALLCONFIG) > .config
bzImage:
	test ! -e broken || { echo 'a.c:1: error: no type' >&2; false; }
	mkdir -p arch/x86/boot
	cp .config arch/x86/boot/bzImage
	echo kernel/fs/ext4/ext4.ko > modules.builtin
kernelrelease:
	echo 9.9.0
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unpacked source package, whose archive holds the folder ``source`` in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_build, "_require_tools", lambda: None)
    folder = tmp_path / "linux-source-9.9"
    folder.mkdir()
    (folder / "Makefile").write_text(MAKEFILE)

    def unpacked(package: Package) -> Path:
        assert package == PACKAGE
        archive = tmp_path / "package" / "usr" / "src" / "linux-source-9.9.tar.xz"
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive, "w:xz") as tar:
            tar.add(folder, "linux-source-9.9")
        return tmp_path / "package"

    monkeypatch.setattr(kernel_build.apt, "unpacked", unpacked)
    return folder


def write_config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "kernel.config"
    path.write_text(text)
    return path


def test_looks_like_an_unpacked_kernel_package(source: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, "# why\nCONFIG_EXT4_FS=y\n")
    tree = kernel_build.built(PACKAGE, config)
    assert (tree / "boot/vmlinuz-9.9.0").read_text() == config.read_text()
    assert "ext4" in (tree / "lib/modules/9.9.0/modules.builtin").read_text()
    assert not (tree / "source").exists(), "1.5 GB that nobody needs again"


def test_only_other_options_build_again(source: Path, tmp_path: Path) -> None:
    first = kernel_build.built(PACKAGE, write_config(tmp_path, "CONFIG_A=y\nCONFIG_B=y\n"))
    same = kernel_build.built(PACKAGE, write_config(tmp_path, "# why\nCONFIG_B=y\nCONFIG_A=y\n"))
    assert same == first
    assert kernel_build.built(PACKAGE, write_config(tmp_path, "CONFIG_A=y\n")) != first


def test_an_option_that_the_kernel_drops_is_an_error(source: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, "CONFIG_A=y\nCONFIG_UNKNOWN=y\n")
    with pytest.raises(UsageError) as caught:
        kernel_build.built(PACKAGE, config)
    assert str(caught.value) == f"{config}: the kernel does not take CONFIG_UNKNOWN=y"


def test_a_build_that_fails_says_why_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    (source / "broken").touch()
    config = write_config(tmp_path, "CONFIG_A=y\n")
    with pytest.raises(UsageError) as caught:
        kernel_build.built(PACKAGE, config)
    assert str(caught.value) == "make failed: a.c:1: error: no type"
    (source / "broken").unlink()
    assert kernel_build.built(PACKAGE, config).is_dir()


def test_missing_tools_are_named_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(kernel_build, "_HEADERS", {"no-such-header.h": "libnone-dev"})
    with pytest.raises(UsageError) as caught:
        kernel_build.built(PACKAGE, write_config(tmp_path, "CONFIG_A=y\n"))
    assert str(caught.value) == (
        "building a kernel takes more tools: apt install make gcc flex bison bc libnone-dev"
    )
