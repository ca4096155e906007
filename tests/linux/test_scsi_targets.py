"""SCSI targets beside disk images, in a guest with sg3-utils.

There are CD drives, devices of the host, which are the kernel's scsi_debug, and a logical unit of
an iSCSI target, which is Debian's tgt.
"""

from __future__ import annotations

import base64
import hashlib
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.linux_guest import LinuxGuest, boot_tiny, image, scratch_directory
from support.scsi_debug import ScsiDebug
from support.scsi_debug import scsi_debug as load_scsi_debug
from support.tgt import Tgt

from pyvmm.backends.scsi import host, iscsi
from pyvmm.backends.scsi.cdrom import MediumLocked
from pyvmm.backends.scsi.host import open_host_device
from pyvmm.errors import UsageError

# LUNs of the guest.
CD, EMPTY, DISK, GENERIC, FORMATTED, REMOTE = range(6)

# Of scsi_debug: where it has its medium error, and the bits of `opts`.
BAD_BLOCK = 0x1234
MEDIUM_ERROR, LOST, RECOVERED_ERROR = 2, 4, 8

TGT_SIZE = 16 << 20


@pytest.fixture(scope="module")
def scsi_debug() -> Iterator[ScsiDebug]:
    """Three logical units, 64 MiB in all, blocks of 512 bytes."""
    with load_scsi_debug(units=3, dev_size_mb=64, num_parts=1, lbpu=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with scratch_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def tgt(directory: Path) -> Iterator[Tgt]:
    if shutil.which("tgtd") is None:
        pytest.skip("tgt is not installed: apt install tgt")
    tgt = Tgt(directory, TGT_SIZE)
    yield tgt
    tgt.stop()


def make_iso(directory: Path, name: str) -> Path:
    """A CD with the file NAME of a megabyte, which its name is the seed of."""
    if shutil.which("xorriso") is None:
        pytest.skip("xorriso is not installed: apt install xorriso")
    tree = directory / f"{name}.d"
    tree.mkdir()
    (tree / name).write_bytes(contents(name))
    path = directory / f"{name}.iso"
    command = ["xorriso", "-as", "mkisofs", "-quiet", "-o", path, tree]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return path


def contents(name: str) -> bytes:
    return random.Random(name).randbytes(1 << 20)


@pytest.fixture(scope="module")
def isos(directory: Path) -> dict[str, Path]:
    return {name: make_iso(directory, name) for name in ("first", "second")}


class Guest(LinuxGuest):
    """The guest with all targets; `sg3` runs the programs of the debian image's disk."""

    def sg3(self, command: str) -> str:
        return self.check(f"chroot /mnt {command} 2>&1")

    def fails(self, command: str) -> str:
        status, output = self.run(f"chroot /mnt {command} 2>&1")
        assert status != 0, output
        return output

    def query(self, lun: int, cdb: bytes, size: int) -> bytes:
        """Data-in of a command, by way of the guest."""
        line = f"sg_raw -o - -r {size} /dev/{self.name(lun, 'scsi_generic')} {cdb.hex(' ')}"
        return base64.b64decode(self.check(f"chroot /mnt {line} 2>/dev/null | base64"))

    def name(self, lun: int, kind: str = "block") -> str:
        return self.check(f"ls /sys/bus/scsi/devices/*:0:0:{lun}/{kind}")


# How long a command waits for the iSCSI target.
PATIENCE = 5


@pytest.fixture(scope="module")
def guest(scsi_debug: ScsiDebug, tgt: Tgt, isos: dict[str, Path]) -> Iterator[Guest]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iscsi, "WAIT_SECONDS", PATIENCE)
        booted = _boot(scsi_debug, tgt, isos)
    guest = Guest(booted.vm)
    guest.console = booted.console
    guest.check(
        "mount -o ro /dev/vda /mnt\n"
        "for each in dev proc sys; do mount -o bind /$each /mnt/$each; done"
    )
    yield guest
    guest.vm.close()


def _boot(scsi_debug: ScsiDebug, tgt: Tgt, isos: dict[str, Path]) -> LinuxGuest:
    return boot_tiny(
        cpus=2,
        memory=512 << 20,
        disks=[{"path": image("debian").disk, "snapshot": True}],
        cdroms=[{"path": isos["first"], "lun": CD}, {"path": "none", "lun": EMPTY}],
        scsi={"queues": 2},
        scsi_devices=[
            {"path": scsi_debug.node(0), "lun": DISK},
            {"path": scsi_debug.node(1, "scsi_generic"), "lun": GENERIC},
            {"path": scsi_debug.node(2), "lun": FORMATTED},
            {"path": tgt.url(), "lun": REMOTE},
        ],
    )


def refusal(path: str) -> str:
    with pytest.raises(UsageError) as caught:
        open_host_device(path)
    return str(caught.value)


def in_use(path: str) -> str:
    return (
        f"the SCSI device {path} is in use on the host: "
        "unmount it and what is on it (lsblk shows that), or end the other program"
    )


def test_opening(scsi_debug: ScsiDebug, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, generic = scsi_debug.node(2), scsi_debug.node(2, "scsi_generic")
    for path in (disk, generic):
        with open_host_device(path) as device:
            assert device.description.startswith("disk Linux scsi_debug")
            assert device.block_size == 512
            assert 65536 <= device.max_transfer <= 16 << 20
            assert device.remark == ""
            for other in (disk, generic):
                assert refusal(other) == in_use(other)
        device.close()
    with monkeypatch.context() as patch:
        patch.setattr(host, "_may_do_all", lambda: False)
        with open_host_device(disk) as device:
            assert device.remark == (
                f"the host's kernel lets only harmless commands through to {disk}, "
                "as pyvmm lacks CAP_SYS_RAWIO"
            )
        patch.setattr(host, "_query", lambda *arguments: b"")
        assert refusal(disk) == (
            f"the SCSI device {disk} does not answer an INQUIRY: check it with sg_inq {disk}"
        )
    assert refusal(f"{disk}1") == (
        f"the SCSI device {disk}1 is a partition: pass the whole of {disk} through, "
        f"or give the guest a disk with --disk {disk}1"
    )
    subprocess.run(["mke2fs", "-q", "-F", f"{disk}1"], check=True)
    subprocess.run(["mount", f"{disk}1", tmp_path], check=True)
    try:
        for path in (disk, generic):
            assert refusal(path) == in_use(path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


class TestHostDevices:
    def test_what_they_say_of_themselves_is_what_they_say(
        self, guest: Guest, scsi_debug: ScsiDebug
    ) -> None:
        queries = {
            "inquiry": (bytes((0x12, 0, 0, 0, 96, 0)), 96),
            **{
                f"page {page:#x}": (bytes((0x12, 1, page, 0, 252, 0)), 252)
                for page in (0x00, 0x80, 0x83, 0xB1, 0xB2)
            },
            "capacity 16": (bytes((0x9E, 0x10, *bytes(8), 0, 0, 0, 32, 0, 0)), 32),
            "capacity 10": (bytes((0x25, *bytes(9))), 8),
            "modes": (bytes((0x5A, 8, 0x3F, 0, 0, 0, 0, 0, 252, 0)), 252),
            "opcodes": (bytes((0xA3, 0x0C, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0)), 4096),
        }
        for index, lun in enumerate((DISK, GENERIC)):
            for name, (cdb, size) in queries.items():
                theirs = scsi_debug.query(index, cdb, size)
                assert theirs, name
                assert guest.query(lun, cdb, size).hex() == theirs.hex(), (lun, name)

    def test_limits_are_those_of_the_host(self, guest: Guest, scsi_debug: ScsiDebug) -> None:
        cdb = bytes((0x12, 1, 0xB0, 0, 64, 0))
        theirs, ours = scsi_debug.query(0, cdb, 64), guest.query(DISK, cdb, 64)
        queue = Path("/sys/block") / Path(scsi_debug.node(0)).name / "queue"
        limit = int((queue / "max_sectors_kb").read_text()) * 2
        assert int.from_bytes(theirs[8:12]) > limit
        assert int.from_bytes(ours[8:12]) == limit
        assert (ours[:8], ours[16:]) == (theirs[:8], theirs[16:])
        name = guest.name(DISK)
        # What the guest's kernel does not exceed, whatever it is asked for.
        guest.run(f"echo 65536 >/sys/block/{name}/queue/max_sectors_kb")
        assert int(guest.check(f"cat /sys/block/{name}/queue/max_sectors_kb")) * 2 <= limit

    def test_data(self, guest: Guest, scsi_debug: ScsiDebug) -> None:
        for index, lun in enumerate((DISK, GENERIC)):
            name = guest.name(lun)
            checksum = guest.check(
                "dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null\n"
                f"dd if=/tmp/data of=/dev/{name} bs=4M seek=2 oflag=direct 2>/dev/null\n"
                f"dd if=/dev/{name} bs=4M skip=2 count=2 iflag=direct 2>/dev/null >/tmp/back\n"
                "cmp /tmp/back /tmp/data\n"
                f"for i in $(seq 40); do dd if=/tmp/data of=/dev/{name} bs=512 count=1 skip=$i "
                "seek=$((16384 + i)) oflag=direct 2>/dev/null; done\n"
                "sha256sum /tmp/data"
            ).split()[0]
            node = scsi_debug.node(index)
            command = ["dd", f"if={node}", "bs=4M", "skip=2", "count=2", "iflag=direct"]
            done = subprocess.run(command, capture_output=True, check=True)
            assert hashlib.sha256(done.stdout).hexdigest() == checksum

    def test_a_file_system(self, guest: Guest) -> None:
        name = guest.name(FORMATTED)
        guest.check(
            f"mke2fs -F /dev/{name}1 >/dev/null\nmkdir -p /tmp/fs\n"
            f"mount -t ext4 /dev/{name}1 /tmp/fs\n"
            "dd if=/dev/urandom of=/tmp/fs/file bs=64k count=200 conv=fsync 2>/dev/null\n"
            "sha256sum </tmp/fs/file >/tmp/sum\numount /tmp/fs\n"
            f"echo 3 >/proc/sys/vm/drop_caches\nmount -t ext4 /dev/{name}1 /tmp/fs\n"
            "sha256sum </tmp/fs/file | cmp - /tmp/sum\numount /tmp/fs"
        )

    def test_nothing_holds_up_others(self, guest: Guest, scsi_debug: ScsiDebug) -> None:
        name = guest.name(DISK)
        scsi_debug.set("ndelay", 900_000_000)
        try:
            start = time.monotonic()
            guest.check(
                "for i in $(seq 8); do dd if=/dev/" + name + " of=/dev/null bs=4k count=1 "
                "skip=$((i * 100)) iflag=direct 2>/dev/null & done; wait"
            )
            took = time.monotonic() - start
        finally:
            scsi_debug.set("ndelay", 0)
        assert 0.9 < took < 0.9 * 5

    def test_medium_error(self, guest: Guest, scsi_debug: ScsiDebug) -> None:
        name = guest.name(DISK)
        read = f"dd if=/dev/{name} bs=512 skip={BAD_BLOCK} count=1 iflag=direct"
        scsi_debug.set("opts", MEDIUM_ERROR)
        try:
            status, output = guest.run(f"dmesg -c >/dev/null; {read}")
            assert status != 0
            assert "No data available" in output
            log = guest.check("dmesg")
            assert "Medium Error" in log
            assert f"sector {BAD_BLOCK}" in log
            sense = guest.fails(
                f"sg_raw -r 512 /dev/{name} 28 00 00 00 {BAD_BLOCK:04x} 00 00 01 00".replace(
                    f"{BAD_BLOCK:04x}", f"{BAD_BLOCK >> 8:02x} {BAD_BLOCK & 0xFF:02x}"
                )
            )
            assert "Medium Error" in sense
            assert "Unrecovered read error" in sense
        finally:
            scsi_debug.set("opts", 0)
        guest.check(read)

    def test_recovered_error(self, guest: Guest, scsi_debug: ScsiDebug) -> None:
        scsi_debug.set("every_nth", 1)
        scsi_debug.set("opts", RECOVERED_ERROR)
        try:
            output = guest.run(
                f"chroot /mnt sg_raw -r 512 /dev/{guest.name(DISK)} 28 0 0 0 0 0 0 0 1 0 2>&1"
            ).output
            assert "Recovered Error" in output
        finally:
            scsi_debug.set("opts", 0)
            scsi_debug.set("every_nth", 0)

    def test_nonsense(self, guest: Guest) -> None:
        name = guest.name(GENERIC)
        for cdb, said in {
            "ff 00 00 00 00 00 00 00 00 00": "Invalid command operation code",
            "7f 00 00 00 00 00 00 18" + " 00" * 24: "Illegal Request",
            "28 00 ff ff ff ff 00 00 01 00": "Logical block address out of range",
            "83 11" + " 00" * 14: "Invalid command operation code",
            "3b 05 00 00 00 00 00 00 00 00": "Invalid field in cdb",
        }.items():
            assert said in guest.fails(f"sg_raw --cmdset=1 /dev/{name} {cdb}"), cdb
        # More data than the command has, and less; data in the wrong direction.
        assert guest.query(GENERIC, bytes((0x12, 0, 0, 0, 5, 0)), 4096)[:1] == b"\0"
        guest.run(f"chroot /mnt sg_raw -s 512 -i /dev/zero /dev/{name} 28 0 0 0 0 0 0 0 1 0 2>&1")
        guest.sg3(f"sg_readcap --16 /dev/{name}")
        guest.sg3(f"sg_turs /dev/{name}")

    def test_programs(self, guest: Guest) -> None:
        name = guest.name(DISK)
        assert "scsi_debug" in guest.sg3(f"sg_inq /dev/{name}")
        assert "Maximum transfer length" in guest.sg3(f"sg_vpd -p bl /dev/{name}")
        assert "Write same" in guest.sg3(f"sg_opcodes /dev/{name}")
        assert "Last LBA" in guest.sg3(f"sg_readcap /dev/{name}")
        guest.sg3(f"sg_unmap --force --lba=100000 --num=100 /dev/{name}")
        assert "6 lun entries" in guest.sg3(f"sg_luns /dev/{name}")


class TestLostCommands:
    def test_a_reset_gets_the_device_back(self, guest: Guest, scsi_debug: ScsiDebug) -> None:
        """The device forgets a command, and the driver does not time out by itself."""
        name = guest.name(DISK)
        scsi_debug.set("every_nth", 1)
        scsi_debug.set("opts", LOST)
        mark = guest.start(
            f"dd if=/dev/{name} of=/dev/null bs=4k count=1 skip=77 iflag=direct & sleep 6\n"
            f"chroot /mnt sg_reset --device /dev/{name} || exit 2\nwait $!"
        )
        time.sleep(3)
        scsi_debug.set("opts", 0)
        scsi_debug.set("every_nth", 0)
        assert guest.finish(mark).status == 0
        assert guest.check(f"cat /sys/block/{name}/device/state") == "running"
        guest.check(f"dd if=/dev/zero of=/dev/{name} bs=4k count=1 seek=2048 oflag=direct")


class TestCdrom:
    def test_found(self, guest: Guest, isos: dict[str, Path]) -> None:
        name = guest.name(CD)
        assert name == "sr0"
        size = isos["first"].stat().st_size
        assert guest.check(f"blockdev --getsize64 /dev/{name}") == str(size)
        assert guest.check(f"cat /sys/block/{name}/queue/logical_block_size") == "2048"
        assert guest.check(f"cat /sys/block/{name}/events") == "media_change eject_request"
        assert "pyvmm" in guest.sg3(f"sg_inq /dev/{name}")
        assert "Unit serial number" in guest.sg3(f"sg_vpd -p sn /dev/{name}")
        blocks = size // 2048
        assert f"Last LBA={blocks - 1}" in guest.sg3(f"sg_readcap /dev/{name}")
        assert "CD-ROM" in guest.sg3(f"sg_get_config /dev/{name}")
        assert "Read TOC" in guest.sg3(f"sg_opcodes /dev/{name}")

    def test_nonsense(self, guest: Guest) -> None:
        name = guest.name(CD, "scsi_generic")
        for cdb, said in {
            "2a 00 00 00 00 00 00 00 00 00": "Invalid command operation code",
            "ff" + " 00" * 15: "Invalid command operation code",
            "43 04 00 00 00 00 00 00 0c 00": "Invalid field in cdb",
            "28 00 ff ff ff ff 00 00 01 00": "Logical block address out of range",
        }.items():
            assert said in guest.fails(f"sg_raw --cmdset=1 /dev/{name} {cdb}"), cdb
        guest.sg3("sg_turs /dev/sr0")

    def test_mounted_and_locked(self, guest: Guest, isos: dict[str, Path]) -> None:
        expected = hashlib.sha256(contents("first")).hexdigest()
        guest.check("mkdir -p /tmp/cd; mount -t iso9660 -o ro /dev/sr0 /tmp/cd")
        assert guest.check("cat /tmp/cd/* | sha256sum").split()[0] == expected
        with pytest.raises(MediumLocked):
            guest.vm.change_medium("cd0", str(isos["second"]))
        assert "Medium removal prevented" in guest.fails("sg_start -v --eject /dev/sr0")
        guest.check("umount /tmp/cd")

    def test_the_host_changes_the_medium(self, guest: Guest, isos: dict[str, Path]) -> None:
        for name in ("second", "first", "second"):
            guest.vm.change_medium("cd0", str(isos[name]))
            assert guest.vm.medium("cd0") == str(isos[name])
            guest.check("mount -t iso9660 -o ro /dev/sr0 /tmp/cd")
            expected = hashlib.sha256(contents(name)).hexdigest()
            assert guest.check("cat /tmp/cd/* | sha256sum").split()[0] == expected
            guest.check("umount /tmp/cd")

    def test_the_guest_ejects_and_loads(self, guest: Guest, isos: dict[str, Path]) -> None:
        # The driver must not close the tray for whoever opens the device.
        guest.check("echo 0 >/proc/sys/dev/cdrom/autoclose")
        name = guest.name(CD, "scsi_generic")
        guest.sg3(f"sg_start --eject /dev/{name}")
        assert guest.vm.medium("cd0") is None
        assert guest.run("dd if=/dev/sr0 of=/dev/null bs=2k count=1").status != 0
        guest.sg3(f"sg_start --load /dev/{name}")
        assert guest.vm.medium("cd0") == str(isos["second"])
        guest.check("dd if=/dev/sr0 of=/dev/null bs=2k count=16")

    def test_an_empty_drive(self, guest: Guest, isos: dict[str, Path]) -> None:
        name = guest.name(EMPTY)
        status, output = guest.run(f"dd if=/dev/{name} of=/dev/null bs=2k count=1")
        assert status != 0
        assert "No medium found" in output
        guest.vm.change_medium("cd1", str(isos["first"]))
        guest.check(f"dd if=/dev/{name} of=/dev/null bs=2k count=16")
        guest.vm.change_medium("cd1", None)
        assert guest.run(f"dd if=/dev/{name} of=/dev/null bs=2k count=1").status != 0


class TestIscsi:
    def test_data(self, guest: Guest, tgt: Tgt) -> None:
        name = guest.name(REMOTE)
        assert guest.check(f"blockdev --getsize64 /dev/{name}") == str(TGT_SIZE)
        checksum = guest.check(
            "dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null\n"
            f"dd if=/tmp/data of=/dev/{name} bs=4M oflag=direct 2>/dev/null\n"
            f"dd if=/dev/{name} bs=1M count=8 iflag=direct 2>/dev/null | cmp - /tmp/data\n"
            "sha256sum /tmp/data"
        ).split()[0]
        written = tgt.disks[1].read_bytes()[: 8 << 20]
        assert hashlib.sha256(written).hexdigest() == checksum

    def test_programs(self, guest: Guest) -> None:
        name = guest.name(REMOTE)
        assert "VIRTUAL-DISK" in guest.sg3(f"sg_inq /dev/{name}")
        assert "IET" in guest.sg3(f"sg_vpd -p di /dev/{name}")
        assert "Last LBA" in guest.sg3(f"sg_readcap --16 /dev/{name}")
        assert "Invalid command" in guest.fails(f"sg_raw --cmdset=1 /dev/{name} ff" + " 00" * 15)
        assert "Invalid command" in guest.fails(f"sg_raw --cmdset=1 /dev/{name} 83" + " 00" * 15)

    def test_the_target_goes_and_comes_back_under_load(self, guest: Guest, tgt: Tgt) -> None:
        name = guest.name(REMOTE)
        mark = guest.start(
            f"for i in $(seq 8); do dd if=/tmp/data of=/dev/{name} bs=256k oflag=direct "
            "|| exit 1; done 2>/dev/null"
        )
        time.sleep(1)
        tgt.stop()
        time.sleep(2)
        tgt.start()
        assert guest.finish(mark, timeout=200).status == 0
        guest.check(f"dd if=/dev/{name} bs=1M count=8 iflag=direct 2>/dev/null | cmp - /tmp/data")


class TestLosses:
    """The last tests: what is lost here does not come back."""

    def test_a_target_that_is_gone(self, guest: Guest, tgt: Tgt) -> None:
        name = guest.name(REMOTE)
        tgt.stop()
        # The driver tries a read five times more.
        start = time.monotonic()
        status, _ = guest.run(
            f"dd if=/dev/{name} of=/dev/null bs=4k count=1 iflag=direct", timeout=300
        )
        assert status != 0
        assert time.monotonic() - start < 12 * PATIENCE
        guest.sg3("sg_turs /dev/sr0")  # others are not concerned

    def test_a_device_that_is_unplugged(self, guest: Guest, scsi_debug: ScsiDebug) -> None:
        name = guest.name(GENERIC)
        (scsi_debug.devices[1] / "delete").write_text("1\n")
        assert guest.run(f"dd if=/dev/{name} of=/dev/null bs=4k count=1 iflag=direct").status != 0
        guest.check(f"dd if=/dev/{guest.name(DISK)} of=/dev/null bs=4k count=1 iflag=direct")

    def test_the_machine_ends_with_commands_under_way(self, guest: Guest) -> None:
        """The driver itself would go on asking the lost target for minutes."""
        guest.start(f"dd if=/dev/{guest.name(REMOTE)} of=/dev/null bs=4k count=1 iflag=direct")
        time.sleep(1)
        start = time.monotonic()
        guest.vm.close()
        assert time.monotonic() - start < 20
        assert guest.vm.outcome is not None
        assert (guest.vm.outcome.status, guest.vm.outcome.error) == (0, None)
