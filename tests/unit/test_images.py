"""How images are made: packages, modules, initramfs, recipes, the cache."""

from __future__ import annotations

import lzma
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

import pyvmm.images
from pyvmm.errors import UsageError
from pyvmm.images import apt, builder, cache, cpio, recipe
from pyvmm.images.kmod import Modules
from pyvmm.nested import bundle

RELEASE = "6.12.1-test"


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pyvmm"


def module(*modinfo: str) -> bytes:
    """A file that has what a module's ``.modinfo`` section holds."""
    return b"\x7fELF..\0" + b"".join(text.encode() + b"\0" for text in modinfo) + b"code"


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """An unpacked kernel package: what `kmod` and `bundle` want to know about, and no more."""
    files = {
        "arch/x86/kvm/kvm.ko.xz": module("depends=irqbypass", "license=GPL"),
        "arch/x86/kvm/kvm-amd.ko.xz": module("depends=kvm"),
        "virt/lib/irqbypass.ko.xz": module("depends="),
        "drivers/net/tun.ko": module("alias=devname:net/tun", "alias=char-major-10-200"),
        "drivers/net/tap.ko": module("depends=tun"),
        "drivers/net/veth.ko": module("alias=rtnl-link-veth"),
        "drivers/block/loop.ko": module("alias=block-major-7-*"),
        "drivers/block/null_blk/null_blk.ko": module("depends="),
        "drivers/scsi/scsi_mod.ko": module("depends="),
        "drivers/scsi/sd_mod.ko": module("depends=scsi_mod"),
        "drivers/scsi/sg.ko": module("depends=scsi_mod"),
        "drivers/scsi/scsi_debug.ko": module("depends=scsi_mod"),
        "drivers/vhost/vhost_net.ko": module("depends=tap,tun"),
        "drivers/vhost/vhost_scsi.ko": module("depends=scsi_mod"),
        "drivers/vhost/vhost-vsock.ko": module("depends="),
        "net/bridge/bridge.ko": module("alias=rtnl-link-bridge"),
    }
    directory = tmp_path / "package" / "lib/modules" / RELEASE
    for name, data in files.items():
        path = directory / "kernel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    (directory / "modules.builtin").write_text("kernel/fs/overlayfs/overlay.ko\n")
    return tmp_path / "package"


class TestModules:
    def test_what_a_module_needs_comes_before_it_and_once(self, kernel: Path) -> None:
        modules = Modules(kernel)
        ordered = modules.with_dependencies(["kvm_amd", "kvm", "vhost_net"])
        names = [each.name for each in ordered]
        assert names == ["irqbypass", "kvm", "kvm_amd", "tun", "tap", "vhost_net"]
        assert ordered[0].data == module("depends=")

    def test_modules_dep_lists_the_first_to_load_last(self, kernel: Path) -> None:
        assert Modules(kernel).dependencies("kvm_amd") == ["kvm", "irqbypass"]

    def test_a_builtin_is_no_file(self, kernel: Path) -> None:
        assert Modules(kernel).with_dependencies(["overlay"]) == []

    def test_a_missing_module_is_named(self, kernel: Path) -> None:
        with pytest.raises(UsageError, match=f"kernel {RELEASE} has no module qxl"):
            Modules(kernel).with_dependencies(["qxl"])


class TestNestedBundle:
    def test_the_index_tells_what_to_load_when(self, kernel: Path) -> None:
        archive = bundle.initramfs(Modules(kernel), b"init program")
        index = archive.partition(b"pyvmm/index\0")[2].partition(b"load ")[2]
        lines = ("load " + index.partition(b"\n\0")[0].decode()).splitlines()
        assert lines[:3] == [
            "load irqbypass.ko",
            "load kvm.ko",
            "load kvm_amd.ko vgif=0 vls=0",
        ]
        assert "alias char-major-10-200 tun.ko" in lines
        assert "node net/tun 10 200" in lines
        assert "alias block-major-7-* loop.ko" in lines
        assert "alias vhost_net tun.ko tap.ko vhost_net.ko" in lines
        assert "alias scsi_debug scsi_mod.ko sd_mod.ko sg.ko scsi_debug.ko" in lines
        assert not any("overlay" in line for line in lines)


class TestCpio:
    @pytest.mark.skipif(shutil.which("cpio") is None, reason="needs cpio")
    def test_cpio_unpacks_what_it_was_given(self, tmp_path: Path) -> None:
        archive = cpio.Archive()
        archive.file("init", b"#!/bin/sh\n", 0o755)
        archive.file("lib/deep/odd", b"12345")
        archive.symlink("bin/sh", "busybox")
        archive.directory("proc")
        subprocess.run(
            ["cpio", "-i", "--quiet"], input=archive.to_bytes(), cwd=tmp_path, check=True
        )
        assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
        assert (tmp_path / "lib/deep/odd").read_bytes() == b"12345"
        assert (tmp_path / "bin/sh").readlink() == Path("busybox")
        assert (tmp_path / "proc").is_dir()

    def test_equal_content_gives_equal_bytes(self) -> None:
        archives = [cpio.Archive(), cpio.Archive()]
        for archive in archives:
            archive.file("a/b", b"x")
        assert archives[0].to_bytes() == archives[1].to_bytes()


class TestCache:
    def test_an_entry_is_made_once(self, cache_root: Path) -> None:
        made = []

        def make(directory: Path) -> None:
            made.append(directory)
            (directory / "file").write_text("x")

        first, second = cache.entry("kind/name", make), cache.entry("kind/name", make)
        assert first == second == cache_root / "kind/name"
        assert (first / "file").read_text() == "x"
        assert len(made) == 1

    def test_a_failure_leaves_nothing(self, cache_root: Path) -> None:
        def make(directory: Path) -> None:
            (directory / "half").touch()
            raise UsageError("no")

        with pytest.raises(UsageError):
            cache.entry("kind/name", make)
        assert list((cache_root / "kind").iterdir()) == []

    def test_what_a_killed_process_left_is_thrown_away(self, cache_root: Path) -> None:
        (cache_root / "kind/name.partial").mkdir(parents=True)
        (cache_root / "kind/name.partial/half").touch()
        assert list(cache.entry("kind/name", lambda _: None).iterdir()) == []

    def test_whoever_comes_second_waits(self) -> None:
        entered, go, made = threading.Event(), threading.Event(), []

        def make(directory: Path) -> None:
            made.append(directory)
            entered.set()
            go.wait(10)

        first = threading.Thread(target=cache.entry, args=("kind/name", make))
        second = threading.Thread(target=cache.entry, args=("kind/name", make))
        first.start()
        assert entered.wait(10)
        second.start()
        go.set()
        first.join()
        second.join()
        assert len(made) == 1


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of fake apt tools, which log their calls. The packages that they know are listed
    in ``system`` and, for lists of pyvmm's own, ``fresh`` and ``debian``; those that can be
    downloaded in files of these names with ``.archive``."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("system", "fresh", "debian"):
        (tools / name).touch()
        (tools / f"{name}.archive").touch()
    (tools / "log").touch()
    lists = (
        f'case "$*" in\n*/fresh/lists*) lists={tools}/fresh ;;\n'
        f"*/debian/lists*sourcelist=*/debian/sources.list*) lists={tools}/debian ;;\n"
        f"*) lists={tools}/system ;;\nesac\n"
    )
    scripts = {
        "apt-cache": 'for last; do :; done\ncase "$*" in\n'
        '*" pkgnames "*) cut -d " " -f 1 "$lists" ;;\n'
        '*" show "*) grep "^$last " "$lists" | sed "s/.* /Version: /" ;;\nesac\n',
        "apt-get": f'for last; do :; done\necho "$last ${{lists##*/}}" >>{tools}/log\n'
        '[ "$last" = update ] && exit\n'
        'name=${last%=*}\nif ! grep -q "^$name ${last#*=}\\$" "$lists.archive"; then\n'
        '    echo "E: Failed to fetch $name  404  Not Found" >&2; exit 100\nfi\n'
        'touch "$name.deb"\n',
        "dpkg-deb": 'echo "files of $2" >"$3/unpacked"\n',
        "mmdebstrap": "for last; do :; done\nfor word; do\n"
        '    case "$word" in *hook=*) file=${word#*>} ;; esac\ndone\n'
        'echo "deb MIRROR $last main" >"$file"\n',
    }
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{lists}{script}")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    apt._prepare.cache_clear()
    return tools


class TestApt:
    PATTERN = r"linux-image-6\.12\.[^-]*-cloud-amd64"

    def test_the_newest_by_number(self, debian: Path) -> None:
        (debian / "system").write_text(
            "linux-image-6.12.9+deb12-cloud-amd64 6.12.9-1\n"
            "linux-image-6.12.117+deb12-cloud-amd64 6.12.117-1~deb12u1\n"
            "linux-image-6.12.200+deb12-cloud-amd64-unsigned 6.12.200-1\n"
            "linux-image-6.12.200+deb12-amd64 6.12.200-1\n"
        )
        package = apt.newest(self.PATTERN)
        assert package == ("linux-image-6.12.117+deb12-cloud-amd64", "6.12.117-1~deb12u1")
        assert (debian / "log").read_text() == ""

    def test_lists_of_its_own_where_the_systems_know_nothing(self, debian: Path) -> None:
        (debian / "fresh").write_text("linux-image-6.12.9-cloud-amd64 6.12.9-1\n")
        assert apt.newest(self.PATTERN).version == "6.12.9-1"
        assert (debian / "log").read_text() == "update fresh\n"

    def test_debian_where_the_systems_sources_do_not_have_it(
        self, debian: Path, cache_root: Path
    ) -> None:
        (debian / "debian").write_text("linux-image-6.12.9-cloud-amd64 6.12.9-1\n")
        assert apt.newest(self.PATTERN).version == "6.12.9-1"
        assert (debian / "log").read_text() == "update fresh\nupdate debian\n"
        sources = (cache_root / "apt/debian/sources.list").read_text()
        assert sources == "deb MIRROR bookworm main\ndeb MIRROR trixie main\n"

    def test_what_to_install_where_debian_cannot_be_asked(
        self, debian: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (debian / "mmdebstrap").unlink()
        monkeypatch.setattr(shutil, "which", lambda name: {"mmdebstrap": None}.get(name, name))
        with pytest.raises(UsageError, match="apt install mmdebstrap debian-archive-keyring"):
            apt.newest(self.PATTERN)

    def test_no_such_package_anywhere(self, debian: Path) -> None:
        with pytest.raises(UsageError, match=r"Debian has no package called linux-image-6"):
            apt.newest(self.PATTERN)

    def test_a_package_is_fetched_once(self, debian: Path) -> None:
        (debian / "system.archive").write_text("busybox-static 1:1.35\n")
        package = apt.Package("busybox-static", "1:1.35")
        first, second = apt.unpacked(package), apt.unpacked(package)
        assert first == second
        assert [path.name for path in first.iterdir()] == ["unpacked"]
        assert (debian / "log").read_text() == "busybox-static=1:1.35 system\n"

    def test_an_outdated_list_is_renewed(self, debian: Path) -> None:
        (debian / "fresh.archive").write_text("tool 2\n")
        assert (apt.unpacked(apt.Package("tool", "2")) / "unpacked").exists()
        assert (debian / "log").read_text() == "tool=2 system\nupdate fresh\ntool=2 fresh\n"

    def test_what_the_archive_has_not_is_an_error_of_one_sentence(
        self, debian: Path, cache_root: Path
    ) -> None:
        message = "apt cannot download tool: Failed to fetch tool  404  Not Found"
        with pytest.raises(UsageError, match=f"^{message}$"):
            apt.unpacked(apt.Package("tool", "2"))
        assert list((cache_root / "packages").iterdir()) == []


class TestRecipes:
    def test_every_recipe_is_whole(self) -> None:
        assert {"tiny", "debian", "generic"} <= {each.name for each in pyvmm.images.listing()}
        for each in map(recipe.load, recipe.names()):
            assert each.files["init"].exists()
            assert each.kernels

    def test_an_unknown_image_is_told_the_known(self) -> None:
        with pytest.raises(UsageError, match="no image called 'tinny': the images are debian, "):
            pyvmm.images.path("tinny")

    def test_an_unknown_kernel_is_told_the_known(self) -> None:
        with pytest.raises(UsageError, match=r"debian has no kernel '5': it has 6.12, 6.1"):
            pyvmm.images.path("debian", kernel="5")

    def test_an_image_that_is_not_built(self) -> None:
        with pytest.raises(UsageError, match="run 'pyvmm images build tiny'"):
            pyvmm.images.path("tiny", build=False)

    def test_a_changed_file_is_another_recipe(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copy = tmp_path / "recipes"
        shutil.copytree(recipe.directory(), copy)
        before = recipe.load("tiny").hash
        monkeypatch.setattr(recipe, "directory", lambda: copy)
        assert recipe.load("tiny").hash == before
        with (copy / "initramfs/init").open("a") as file:
            file.write("# changed\n")
        assert recipe.load("tiny").hash != before

    def test_the_newest_build_is_found_again(
        self, monkeypatch: pytest.MonkeyPatch, cache_root: Path
    ) -> None:
        builds = iter(["tiny-1", "tiny-2"])

        def build(_: recipe.Recipe) -> Path:
            return cache.entry(f"images/{next(builds)}", lambda _: None)

        monkeypatch.setattr(builder, "build", build)
        assert pyvmm.images.path("tiny").directory == cache_root / "images/tiny-1"
        assert pyvmm.images.path("tiny").kernel == cache_root / "images/tiny-1/vmlinuz-6.12"
        assert pyvmm.images.build("tiny") == cache_root / "images/tiny-2"
        assert pyvmm.images.path("tiny").directory == cache_root / "images/tiny-2"


class TestInit:
    """The shell functions of guest-images/initramfs/init, on a command line of the test's."""

    @pytest.fixture
    def parameter(self, tmp_path: Path) -> object:
        init = (recipe.directory() / "initramfs/init").read_text()
        function = init[init.index("parameter()") : init.index("\nflag()")]
        command_line = tmp_path / "cmdline"

        def parameter(line: str, name: str) -> str:
            command_line.write_text(line + "\n")
            script = function.replace("/proc/cmdline", str(command_line))
            return subprocess.run(
                ["sh", "-c", f"{script}\nparameter {name}"],
                check=True,
                capture_output=True,
                text=True,
            ).stdout.removesuffix("\n")

        return parameter

    @pytest.mark.parametrize(
        ("line", "value"),
        [
            ("console=ttyS0 pyvmm.run=report", "report"),
            ('pyvmm.run="echo a; ls -l | wc" quiet', "echo a; ls -l | wc"),
            ('quiet pyvmm.run="report"', "report"),
            ("not.pyvmm.run=x quiet", ""),
            ("quiet", ""),
            ("pyvmm.run=first pyvmm.run=last", "last"),
            (f"a {pyvmm.images.run_parameter('a')} b", "base64:YQ=="),
        ],
    )
    def test_parameters(self, parameter: object, line: str, value: str) -> None:
        assert callable(parameter)
        assert parameter(line, "pyvmm.run") == value

    def test_the_scripts_are_shell(self) -> None:
        for name in ("initramfs/init", "initramfs/report", "tiny/init", "debian/setup"):
            subprocess.run(["sh", "-n", recipe.directory() / name], check=True)
