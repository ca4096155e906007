"""SCSI disks under a stock kernel: how many, what sg3-utils say, coming, going, and stress."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.linux_guest import LinuxGuest, Result, boot_tiny, image, scratch_directory

Boot = Callable[..., LinuxGuest]
MakeDisk = Callable[..., Path]

DISKS = 256
SECONDS = 10


def scsi(path: Path, **keys: object) -> dict[str, object]:
    return {"path": path, "bus": "scsi", **keys}


def wait_for(guest: LinuxGuest, condition: str) -> None:
    """Until a shell command succeeds in the guest, for 60 seconds."""
    guest.check(
        f"for n in $(seq 300); do if {condition}; then exit 0; fi; usleep 200000; done; false"
    )


# Debian's disk, read-only, with what a chroot needs.
CHROOT = """
mkdir -p /debian
mount -o ro,noload "$1" /debian
mount -t devtmpfs devtmpfs /debian/dev
mount -t proc proc /debian/proc
mount -t sysfs sysfs /debian/sys
mount -t tmpfs tmpfs /debian/tmp
mount -t tmpfs tmpfs /debian/mnt
"""


def debian_disk() -> dict[str, object]:
    disk = image("debian").disk
    assert disk is not None
    return {"path": disk, "readonly": True}


def with_debian(guest: LinuxGuest, device: str = "/dev/vda") -> None:
    guest.check(CHROOT.replace("$1", device))


def test_hundreds_of_disks(boot: Boot, disk: MakeDisk) -> None:
    """Each is found, with its serial number."""
    disks = [scsi(disk(f"{n}", 8 << 20), serial=f"serial{n:04}") for n in range(DISKS)]
    guest = boot(append="log_buf_len=8M", disks=disks)
    wait_for(guest, f"[ $(ls -d /sys/block/sd* | wc -l) = {DISKS} ]")
    found = guest.check(
        "for d in /sys/class/scsi_device/*; do "
        'echo "${d##*:} $(tail -c +5 $d/device/vpd_pg80)"; done | sort -n'
    )
    assert found.split("\n") == [f"{n} serial{n:04}" for n in range(DISKS)]
    first = guest.check("dmesg | sed -n 's/^\\[ *\\([0-9.]*\\).*scsi host0: .*/\\1/p'")
    last = guest.check(
        "dmesg | sed -n 's/^\\[ *\\([0-9.]*\\).*Attached SCSI disk.*/\\1/p' | tail -1"
    )
    print(f"{DISKS} disks found in {float(last) - float(first):.1f} s")
    assert guest.poweroff().status == 0


def test_a_file_system_far_away(boot: Boot, disk: MakeDisk) -> None:
    """ext4 on LUN 255, where no other is, gives space back and survives a reboot."""
    path = disk("a", 64 << 20)
    guest = boot(disks=[debian_disk(), scsi(path, lun=255)])
    wait_for(guest, "[ -b /dev/sda ]")
    with_debian(guest)
    guest.check("chroot /debian mkfs.ext4 -q -E nodiscard /dev/sda && mount /dev/sda /mnt")
    guest.check("dd if=/dev/urandom of=/mnt/file bs=1M count=24 2>/dev/null; sync")
    full = path.stat().st_blocks
    guest.check("rm /mnt/file; echo still here >/mnt/file; sync; fstrim /mnt")
    assert path.stat().st_blocks < full - (20 << 20) // 512
    guest.console.send("sync; reboot -f\n")
    guest.await_obedience()
    wait_for(guest, "[ -b /dev/sda ]")
    assert guest.check("ls /sys/class/scsi_device") == "0:0:0:255"
    assert guest.check("mount /dev/sda /mnt && cat /mnt/file") == "still here"
    assert guest.poweroff().status == 0


class SgGuest(NamedTuple):
    """A guest with Debian's disk mounted, and one SCSI disk whose image is at `path`."""

    guest: LinuxGuest
    path: Path

    def run(self, command: str) -> Result:
        """Runs a program of Debian's disk."""
        return self.guest.run(f"chroot /debian {command}")

    def __call__(self, command: str) -> str:
        return self.guest.check(f"chroot /debian {command}")


@pytest.fixture(scope="module")
def sg() -> Iterator[SgGuest]:
    with scratch_directory() as directory:
        path = directory / "disk.img"
        path.touch()
        os.truncate(path, 16 << 20)
        guest = boot_tiny(disks=[debian_disk(), scsi(path, serial="WD-1234")])
        try:
            wait_for(guest, "[ -b /dev/sda ]")
            with_debian(guest)
            yield SgGuest(guest, path)
        finally:
            guest.vm.close()


class TestSg3Utils:
    """What the programs of sg3-utils make of a disk."""

    def test_sg_inq(self, sg: SgGuest) -> None:
        text = sg("sg_inq -d /dev/sda")
        assert "Vendor identification: pyvmm" in text
        assert "Unit serial number: WD-1234" in text
        assert "SPC-4" in text
        assert "SBC-3" in text

    def test_sg_vpd(self, sg: SgGuest) -> None:
        assert "Unit serial number: WD-1234" in sg("sg_vpd -p sn /dev/sda")
        assert "vendor specific: WD-1234" in sg("sg_vpd -p di /dev/sda")
        limits = sg("sg_vpd -p bl /dev/sda")
        assert "Maximum transfer length: 65536 blocks" in limits
        assert "Maximum unmap LBA count: 4194304" in limits
        assert "Write same non-zero (WSNZ): 1" in limits
        assert "Non-rotating medium (e.g. solid state)" in sg("sg_vpd -p bdc /dev/sda")
        provisioning = sg("sg_vpd -p lbpv /dev/sda")
        assert "Unmap command supported (LBPU): 1" in provisioning
        assert "Provisioning type: 2 (thin provisioned)" in provisioning

    def test_sg_readcap(self, sg: SgGuest) -> None:
        text = sg("sg_readcap -l /dev/sda")
        assert "Number of logical blocks=32768" in text
        assert "lbpme=1, lbprz=1" in text
        assert "Logical blocks per physical block exponent=3" in text

    def test_sg_luns(self, sg: SgGuest) -> None:
        text = sg("sg_luns /dev/sda")
        assert "Report luns [select_report=0x0]:" in text
        assert "0000000000000000" in text
        assert "c101000000000000" in sg("sg_luns -s 2 /dev/sda")

    def test_sg_opcodes(self, sg: SgGuest) -> None:
        text = sg("sg_opcodes /dev/sda")
        for name in ("Unmap", "Write same(16)", "Persistent reserve out", "Read capacity(16)"):
            assert name.lower() in text.lower()
        assert "28 18 ff ff ff ff 00 ff ff 00" in sg("sg_opcodes -o 0x28 /dev/sda")

    def test_sg_persist(self, sg: SgGuest) -> None:
        sg("sg_persist -o -G -S 0xabc123 /dev/sda")
        assert "0xabc123" in sg("sg_persist -i -k /dev/sda")
        sg("sg_persist -o -R -K 0xabc123 -T 5 /dev/sda")
        assert "Write Exclusive, registrants only" in sg("sg_persist -i -r /dev/sda")
        sg("sg_persist -i -c /dev/sda")
        sg("sg_persist -i -s /dev/sda")
        sg("sg_persist -o -C -K 0xabc123 /dev/sda")
        assert "there are NO registered reservation keys" in sg("sg_persist -i -k /dev/sda")

    def test_sg_unmap(self, sg: SgGuest) -> None:
        sg.guest.check("dd if=/dev/urandom of=/dev/sda bs=1M count=2 2>/dev/null; sync")
        before = sg.path.stat().st_blocks
        sg("sg_unmap -f -l 0 -n 2048 /dev/sda")
        assert sg.path.stat().st_blocks <= before - 2048
        sg("sg_write_same -l 2048 -n 1024 --16 --unmap -i /dev/zero -x 512 /dev/sda")
        assert sg.path.stat().st_blocks <= before - 3072
        sg("sg_verify -l 0 -c 4096 /dev/sda")

    def test_modes(self, sg: SgGuest) -> None:
        assert "write back" in sg.guest.check("cat /sys/class/scsi_disk/*/cache_type")
        sg.guest.check("echo 'write through' >/sys/class/scsi_disk/0:0:0:0/cache_type")
        assert sg.guest.check("cat /sys/block/sda/queue/write_cache") == "write through"
        sg.guest.check("dd if=/dev/zero of=/dev/sda bs=4k count=4 oflag=direct 2>/dev/null")
        sg.guest.check("echo 'write back' >/sys/class/scsi_disk/0:0:0:0/cache_type")
        assert "Caching" in sg("sg_modes /dev/sda")

    def test_nonsense(self, sg: SgGuest) -> None:
        invalid_opcode, aborted_or_invalid = "Invalid command operation code", "Illegal request"
        assert invalid_opcode.lower() in sg.run("sg_raw /dev/sda ff 0 0 0 0 0").output.lower()
        for cdb in (
            "28 e0 0 0 0 0 0 0 1 0",  # protection information
            "28 0 ff ff ff ff 0 0 1 0",  # beyond the end
            "12 2 0 0 60 0",
            "9e 1f 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
        ):
            result = sg.run(f"sg_raw -r 512 /dev/sda {cdb}")
            assert aborted_or_invalid.lower() in result.output.lower(), cdb
            assert result.status != 0
        # Data in the wrong direction and too little of it: an error, and the disk goes on.
        assert sg.run("sg_raw -r 512 /dev/sda 28 0 0 0 0 0 0 0 2 0").status != 0
        assert sg.run("sg_raw -s 512 -i /dev/zero /dev/sda 28 0 0 0 0 0 0 0 1 0").status != 0
        assert sg.guest.check("dd if=/dev/sda of=/dev/null bs=1M 2>/dev/null; echo fine") == (
            "fine"
        )

    def test_resets(self, sg: SgGuest) -> None:
        reading = "dd if=/dev/sda of=/dev/null bs=64k iflag=direct 2>/dev/null"
        sg.guest.check(f"(for n in 1 2 3 4; do {reading}; done; echo $? >/tmp/done) & sleep 0.2")
        sg("sg_reset -N -d /dev/sda")
        wait_for(sg.guest, "[ -s /tmp/done ]")
        assert sg.guest.check("cat /tmp/done") == "0"


def test_disks_come_and_go(boot: Boot, disk: MakeDisk) -> None:
    guest = boot(disks=[scsi(disk("a"))])
    wait_for(guest, "[ -b /dev/sda ]")
    for _ in range(3):
        place = guest.vm.add_scsi_disk(path=disk("b"), target=3, lun=5, serial="later")
        assert place == (3, 5)
        wait_for(guest, "ls /sys/class/scsi_device/0:0:3:5/device/block")
        node = guest.check("ls /sys/class/scsi_device/0:0:3:5/device/block")
        guest.check(f"echo hello | dd of=/dev/{node} bs=512 conv=sync 2>/dev/null; sync")
        path = Path(guest.vm.config.disks[0].path).with_name("b.img")
        assert path.read_bytes()[:6] == b"hello\n"
        guest.vm.remove_scsi_disk(3, 5)
        path.unlink()
        wait_for(guest, "! [ -e /sys/class/scsi_device/0:0:3:5 ]")
    guest.vm.resize_disk("0:0", "24M")
    wait_for(guest, "[ $(cat /sys/block/sda/size) = 49152 ]")
    assert guest.vm.add_scsi_disk(path=disk("c")) == (0, 1)
    wait_for(guest, "ls /sys/class/scsi_device/0:0:0:1/device/block")
    # Linux counts those in flat space from 0x4000 on.
    assert guest.vm.add_scsi_disk(path=disk("d"), lun=300) == (0, 300)
    wait_for(guest, f"ls /sys/class/scsi_device/0:0:0:{0x4000 + 300}/device/block")
    guest.check("dd if=/dev/sda of=/dev/null 2>/dev/null")
    assert guest.poweroff().status == 0


def test_many_writers_on_many_queues(boot: Boot, disk: MakeDisk, disk_stress: Path) -> None:
    guest = boot(
        cpus=2,
        scsi="queues=2",
        disks=[
            scsi(disk("a", 32 << 20)),
            scsi(disk("b", 32 << 20), cache="writethrough"),
            {"path": disk_stress, "readonly": True},
        ],
    )
    wait_for(guest, "[ -b /dev/sdb ]")
    guest.check("tar -x -f /dev/vda -C /tmp")
    guest.check(f"/tmp/disk_stress {SECONDS} 4 /dev/sda /dev/sdb", timeout=SECONDS + 300)
    assert guest.check("dmesg | grep -c -E 'hung_task|blocked for more than' || true") == "0"
    assert "abort" not in guest.check("dmesg | grep 'sd ' || true")
    assert guest.poweroff().status == 0
