"""Ways to boot a stock kernel: what is entered, how much memory, how many devices, and resets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.linux_guest import NESTED, LinuxGuest, image

from pyvmm.boot.bzimage import BzImage
from pyvmm.boot.payload import unpack
from pyvmm.errors import ExitStatus, GuestCrash, UsageError
from pyvmm.platform import power

Boot = Callable[..., LinuxGuest]
MakeDisk = Callable[..., Path]

# The least with which Debian's kernel, unpacked on the host, and the initramfs get to a shell.
LEAST_MEMORY_MIB = 96


def vmlinux(directory: Path) -> Path:
    """The ELF file in the kernel of the tiny image."""
    kernel = image("tiny").kernel
    data = kernel.read_bytes()
    header = BzImage(data[:4096], len(data), str(kernel))
    path = directory / "vmlinux"
    start = header.payload_offset
    path.write_bytes(unpack(bytearray(data[start : start + header.payload_size]), str(kernel)))
    return path


def huge_pages(which: str) -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"HugePages_{which}:"))


def memory_kib(guest: LinuxGuest) -> int:
    return int(guest.check("sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"))


class TestKernelFormats:
    def test_bzimage_entered_at_its_own_entry_point(self, boot: Boot) -> None:
        guest = boot(boot="bzimage")
        assert guest.check("uname -m") == "x86_64"
        assert guest.poweroff().status == 0

    def test_vmlinux(self, boot: Boot, scratch: Path) -> None:
        guest = boot(kernel=vmlinux(scratch))
        assert guest.check("uname -m") == "x86_64"
        assert guest.poweroff().status == 0


class TestMemory:
    def test_the_least(self, boot: Boot) -> None:
        guest = boot(memory=LEAST_MEMORY_MIB << 20)
        assert memory_kib(guest) < LEAST_MEMORY_MIB << 10
        assert guest.poweroff().status == 0

    def test_too_little_is_an_error_before_the_start(self, boot: Boot) -> None:
        with pytest.raises(UsageError, match=r"kernel .* needs \d+ MiB to start"):
            boot(memory=32 << 20)

    def test_more_than_fits_below_the_hole(self, boot: Boot) -> None:
        guest = boot(memory=5 << 30, cpus=2)
        assert memory_kib(guest) > int(4.75 * (1 << 20))
        e820 = guest.check("dmesg | sed -n 's/.*BIOS-e820: //p'")
        assert "[mem 0x0000000000100000-0x00000000bfffffff] usable" in e820
        assert "[mem 0x0000000100000000-0x000000017fffffff] usable" in e820
        assert guest.poweroff().status == 0

    def test_huge_pages(self, boot: Boot) -> None:
        pool = Path("/proc/sys/vm/nr_hugepages")
        if not NESTED:
            pytest.skip("would take huge pages from this machine; scripts/test linux runs it")
        before = pool.read_text()
        pool.write_text("96")
        try:
            guest = boot(memory=192 << 20, hugepages=True)
            assert huge_pages("Free") - huge_pages("Rsvd") == 0
            assert guest.poweroff().status == 0
            guest.vm.close()
            assert huge_pages("Free") - huge_pages("Rsvd") == 96
        finally:
            pool.write_text(before)


def test_without_acpi(boot: Boot) -> None:
    """Debian's cloud kernel cannot read MP tables (no X86_MPPARSE), so it has one CPU."""
    guest = boot(append="acpi=off", cpus=2)
    assert guest.check("nproc") == "1"
    assert "acpi" not in guest.check("ls /sys/firmware")
    guest.console.send("reboot -f\n")  # without ACPI's reset register
    guest.await_obedience()


def test_more_devices_than_interrupts(boot: Boot, disk: MakeDisk) -> None:
    """22 disks, the generator of random numbers: some share an interrupt."""
    disks = [disk(f"disk{n}", 1 << 20) for n in range(22)]
    guest = boot(disks=disks, cpus=2)
    script = "; ".join(
        f"(dd if=/dev/urandom of=/tmp/{name} bs=64k count=16 2>/dev/null; "
        f"dd if=/tmp/{name} of=/dev/{name} bs=4k oflag=direct 2>/dev/null; "
        f"dd if=/dev/{name} bs=4k iflag=direct 2>/dev/null | cmp - /tmp/{name} && echo {name}) &"
        for name in (f"vd{chr(ord('a') + n)}" for n in range(22))
    )
    assert len(guest.check(f"{script} wait".replace("&;", "&")).split()) == 22
    rows = guest.check("grep virtio /proc/interrupts").splitlines()
    assert len(rows) < 23
    assert guest.poweroff().status == 0


class TestReset:
    @pytest.mark.parametrize(
        ("method", "port_value"),
        [("acpi", b"\x06"), ("kbd", bytes([power.I8042_PULSE_RESET]))],
    )
    def test_reboot_starts_the_guest_again(
        self, method: str, port_value: bytes, boot: Boot, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Through the ACPI reset register and the keyboard controller, as the kernel is told."""
        written = []
        write = power.ResetPort.write

        def spy(port: power.ResetPort, offset: int, data: bytes) -> None:
            written.append(data)
            write(port, offset, data)

        monkeypatch.setattr(power.ResetPort, "write", spy)
        guest = boot(append=f"reboot={method}")
        for _ in range(2):
            guest.check("echo here >/tmp/from-before")
            guest.console.send("reboot -f\n")
            guest.await_obedience()
            assert guest.run("ls /tmp/from-before").status != 0
        assert written == [port_value] * 2
        assert guest.poweroff().status == 0

    def test_reboot_can_be_the_end(self, boot: Boot) -> None:
        guest = boot(reboot=False)
        guest.console.send("reboot -f\n")
        outcome = guest.vm.wait(timeout=300)
        assert (outcome.status, outcome.error) == (ExitStatus.OK, None)

    def test_triple_fault_is_a_crash_with_a_report(self, boot: Boot) -> None:
        guest = boot(append="reboot=triple")
        guest.console.send("echo last words; reboot -f\n")
        outcome = guest.vm.wait(timeout=300)
        assert outcome.status == ExitStatus.GUEST_CRASH
        with pytest.raises(GuestCrash, match="triple fault") as caught:
            outcome.check()
        notes = "\n".join(caught.value.__notes__)
        assert "| last words" in notes
        if "on AMD processors a shutdown resets the vCPU" not in notes:
            assert "rip ffffffff" in notes
            assert "code at 0xffffffff" in notes


def test_a_paused_guest_stands_still(boot: Boot) -> None:
    guest = boot(cpus=2)
    guest.vm.pause()
    guest.console.read(timeout=1)  # what was under way
    guest.console.send("echo I am awake\n")
    assert guest.console.read(timeout=3) == b""
    guest.vm.resume()
    guest.console.expect("I am awake", timeout=120)
