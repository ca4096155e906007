"""One machine with everything in it, as its guest sees it: CPUs, clock, memory, disks, consoles."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.linux_guest import NESTED, LinuxGuest, boot_tiny, scratch_directory

CPUS = 4
MEMORY_MIB = 512
ODD_SIZE = 12345 * 512

# A serial port takes an exit for each byte, and in an emulated machine that is 0.2 ms.
SERIAL_BYTES = 1 << (14 if NESTED else 20)
CONSOLE_BYTES = 1 << 20

# Messages of level "error" and worse that are none of our business.
KNOWN_ERRORS = [
    "PCI: Fatal: No config space access function found",  # there is no PCI
    # The SVM that QEMU emulates does not intercept XSETBV, so KVM cannot update CPUID.
    *(["arch/x86/kernel/fpu/xstate.c"] if NESTED else []),
]


def _boot(directory: Path) -> LinuxGuest:
    disks = {
        "plain": {"size": 64 << 20},
        "readonly": {"readonly": True, "serial": "only-read"},
        "direct": {"direct": True, "serial": "exactly-20-character"},
        "queues": {"queues": CPUS, "queue_size": 64},
        "through": {"cache": "writethrough"},
        "odd": {"size": ODD_SIZE},
        "seventh": {},
        "eighth": {},
    }
    tables = []
    for name, options in disks.items():
        path = directory / f"{name}.img"
        with path.open("wb") as file:
            file.write(f"This is the disk {name}.".encode())
            file.truncate(options.pop("size", 8 << 20))
        tables.append({"path": path, **options})
    return boot_tiny(
        cpus=CPUS,
        memory=MEMORY_MIB << 20,
        console="pipe",
        disks=tables,
    )


@pytest.fixture(scope="module")
def guests() -> Iterator[list[LinuxGuest]]:
    guests: list[LinuxGuest] = []
    yield guests
    for guest in guests:
        guest.vm.close()


@pytest.fixture(scope="module")
def disks() -> Iterator[Path]:
    with scratch_directory() as directory:
        yield directory


@pytest.fixture
def guest(guests: list[LinuxGuest], disks: Path) -> LinuxGuest:
    """The machine, which all tests share; booted again after one that lost it."""
    if guests and not guests[-1].usable:
        guests.pop().vm.close()
    if not guests:
        guests.append(_boot(disks))
    return guests[-1]


def attribute(guest: LinuxGuest, path: str) -> str:
    return guest.check(f"cat /sys/{path}")


class TestCpus:
    def test_all_are_there_with_the_right_topology(self, guest: LinuxGuest) -> None:
        assert guest.check("nproc") == str(CPUS)
        rows = guest.check(
            "cd /sys/devices/system/cpu; for cpu in cpu[0-9]*; do cd $cpu/topology;"
            "echo $cpu $(cat physical_package_id core_id thread_siblings_list core_siblings_list);"
            "cd ../..; done"
        )
        assert rows.splitlines() == [f"cpu{n} 0 {n} {n} 0-{CPUS - 1}" for n in range(CPUS)]

    def test_each_works_and_takes_timer_interrupts(self, guest: LinuxGuest) -> None:
        before = interrupts(guest, "LOC:")
        for cpu in range(CPUS):
            assert guest.check(f"taskset -c {cpu} sh -c 'cut -d \" \" -f 39 /proc/self/stat'") == (
                str(cpu)
            )
            guest.check(f"taskset -c {cpu} sleep 0.2")
        after = interrupts(guest, "LOC:")
        assert len(after) == CPUS
        assert all(now > then for then, now in zip(before, after, strict=True)), (before, after)

    def test_each_can_interrupt_each(self, guest: LinuxGuest) -> None:
        """A process that moves to another CPU is handed over with an interrupt."""
        guest.check(
            "for round in $(seq 10); do for cpu in $(seq 0 3); do taskset -p -c $cpu $$; done; done"
        )

    def test_no_interrupt_was_in_error(self, guest: LinuxGuest) -> None:
        assert guest.check("sed -n 's/^ *\\(ERR\\|MIS\\): *//p' /proc/interrupts") == "0\n0"


def interrupts(guest: LinuxGuest, name: str) -> list[int]:
    """How many interrupts each CPU has taken of the one whose row has `name`."""
    row = guest.check(f"grep '{name}' /proc/interrupts")
    return [int(word) for word in row.split()[1 : CPUS + 1]]


class TestClock:
    def test_source_is_kvm_clock(self, guest: LinuxGuest) -> None:
        name = attribute(guest, "devices/system/clocksource/clocksource0/current_clocksource")
        assert name == "kvm-clock"

    def test_time_of_day_is_the_hosts(self, guest: LinuxGuest) -> None:
        before = time.time()
        there = float(guest.check("date +%s"))
        assert before - 3 <= there <= time.time() + 3

    def test_a_second_takes_a_second(self, guest: LinuxGuest) -> None:
        # A loaded host may make it longer, and nothing may make it shorter.
        start = time.monotonic()
        guest.check("sleep 3")
        assert time.monotonic() - start >= 3


class TestMemory:
    def test_all_of_it_is_usable(self, guest: LinuxGuest) -> None:
        total = int(guest.check("sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"))
        assert (MEMORY_MIB - 64) << 10 < total < MEMORY_MIB << 10

    def test_every_page_keeps_what_is_written(self, guest: LinuxGuest) -> None:
        guest.check(
            "mount -t tmpfs -o size=380m tmpfs /mnt; trap 'umount /mnt' EXIT; cd /mnt\n"
            "dd if=/dev/urandom of=seed bs=1M count=12 2>/dev/null\n"
            "for i in $(seq 30); do cat seed >part$i; done\n"
            "for i in $(seq 30); do cmp seed part$i; done; cd /"
        )


def test_the_boot_left_no_error_in_the_log(guest: LinuxGuest) -> None:
    lines = [
        line
        for line in guest.check("dmesg -r").splitlines()
        if re.match(r"<[0-3]>", line) or "WARNING" in line or "nobody cared" in line
        if not any(known in line for known in KNOWN_ERRORS)
    ]
    assert lines == []


class TestEntropy:
    def test_the_kernel_uses_the_device(self, guest: LinuxGuest) -> None:
        assert attribute(guest, "class/misc/hw_random/rng_current").startswith("virtio_rng")

    def test_bytes_come_and_differ(self, guest: LinuxGuest) -> None:
        blocks = [
            guest.check("dd if=/dev/hwrng bs=512 count=8 iflag=fullblock 2>/dev/null | base64")
            for _ in range(2)
        ]
        assert blocks[0] != blocks[1]
        assert all(len(block.replace("\n", "")) == 5464 for block in blocks)


class TestDisks:
    def test_each_has_its_name_contents_and_size(self, guest: LinuxGuest) -> None:
        names = ["plain", "readonly", "direct", "queues", "through", "odd", "seventh", "eighth"]
        text = guest.check("for disk in /dev/vd?; do head -c 40 $disk | tr -d '\\0'; echo; done")
        assert text.splitlines() == [f"This is the disk {name}." for name in names]
        assert attribute(guest, "block/vda/size") == str((64 << 20) // 512)
        assert attribute(guest, "block/vdb/size") == str((8 << 20) // 512)

    def test_serial_numbers(self, guest: LinuxGuest) -> None:
        assert attribute(guest, "block/vda/serial") == ""
        assert attribute(guest, "block/vdb/serial") == "only-read"
        assert attribute(guest, "block/vdc/serial") == "exactly-20-character"

    def test_readonly(self, guest: LinuxGuest) -> None:
        assert attribute(guest, "block/vdb/ro") == "1"
        assert attribute(guest, "block/vda/ro") == "0"
        status, output = guest.run("dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=fsync")
        assert status != 0
        assert "not permitted" in output

    def test_each_cpu_has_its_own_queue(self, guest: LinuxGuest) -> None:
        assert guest.check("cat /sys/block/vdd/mq/*/cpu_list") == "\n".join(
            str(cpu) for cpu in range(CPUS)
        )
        assert guest.check("ls /sys/block/vda/mq") == "0"
        before = interrupts(guest, "virtio3$")
        for cpu in range(CPUS):
            guest.check(f"taskset -c {cpu} dd if=/dev/vdd of=/dev/null bs=4k count=8 iflag=direct")
        assert sum(interrupts(guest, "virtio3$")) >= sum(before) + 8 * CPUS

    def test_queue_size(self, guest: LinuxGuest) -> None:
        assert attribute(guest, "block/vdd/mq/0/nr_tags") == "64"
        assert attribute(guest, "block/vda/mq/0/nr_tags") == "256"

    def test_cache_mode_is_seen_and_can_be_switched(self, guest: LinuxGuest) -> None:
        for disk, there, other in (
            ("vda", "write back", "write through"),
            ("vde", "write through", "write back"),
        ):
            path = f"block/{disk}/cache_type"
            assert attribute(guest, path) == there
            for mode in (other, there):
                guest.check(f"echo {mode} >/sys/{path}")
                assert attribute(guest, path) == mode
                guest.check(f"dd if=/dev/urandom of=/dev/{disk} bs=4k count=4 seek=1 conv=fsync")

    def test_topology_and_limits(self, guest: LinuxGuest) -> None:
        names = (
            "logical_block_size physical_block_size minimum_io_size "
            "discard_granularity discard_max_bytes write_zeroes_max_bytes rotational"
        )
        rows = {
            disk: dict(
                zip(
                    names.split(),
                    map(int, guest.check(f"cd /sys/block/{disk}/queue; cat {names}").split()),
                    strict=True,
                )
            )
            for disk in ("vda", "vdb")
        }
        plain, readonly = rows["vda"], rows["vdb"]
        assert (plain["logical_block_size"], plain["physical_block_size"]) == (512, 4096)
        assert plain["minimum_io_size"] == 4096
        assert plain["discard_granularity"] == 4096
        assert plain["discard_max_bytes"] > 0
        assert plain["write_zeroes_max_bytes"] > 0
        assert readonly["discard_max_bytes"] == readonly["write_zeroes_max_bytes"] == 0

    def test_a_disk_of_an_odd_number_of_sectors(self, guest: LinuxGuest) -> None:
        assert guest.check("blockdev --getsize64 /dev/vdf") == str(ODD_SIZE)
        last = ODD_SIZE // 512 - 1
        output = guest.check(
            "dd if=/dev/urandom of=/tmp/sector bs=512 count=1 2>/dev/null\n"
            f"dd if=/tmp/sector of=/dev/vdf bs=512 seek={last} oflag=direct 2>/dev/null\n"
            f"dd if=/dev/vdf bs=512 skip={last} iflag=direct 2>/dev/null | cmp - /tmp/sector\n"
            "sha256sum </tmp/sector"
        )
        path = guest.vm.config.disks[5].path
        with Path(path).open("rb") as file:
            file.seek(last * 512)
            assert hashlib.sha256(file.read()).hexdigest() == output.split()[0]

    def test_nothing_is_beyond_the_end(self, guest: LinuxGuest) -> None:
        end = ODD_SIZE // 512
        assert guest.check(f"dd if=/dev/vdf bs=512 skip={end} count=1 2>/dev/null | wc -c") == "0"
        status, output = guest.run(
            f"dd if=/dev/zero of=/dev/vdf bs=512 seek={end} count=1 oflag=direct"
        )
        assert status != 0
        assert "No space left" in output
        assert Path(guest.vm.config.disks[5].path).stat().st_size == ODD_SIZE

    def test_a_discard_gives_space_back_and_leaves_zeroes(self, guest: LinuxGuest) -> None:
        path = guest.vm.config.disks[6].path
        guest.check("dd if=/dev/urandom of=/dev/vdg bs=1M count=8 conv=fsync 2>/dev/null")
        assert Path(path).stat().st_blocks * 512 == 8 << 20
        guest.check("blkdiscard -o 1M -l 6M /dev/vdg")
        assert Path(path).stat().st_blocks * 512 == 2 << 20
        assert (
            guest.check("dd if=/dev/vdg bs=1M skip=1 count=6 2>/dev/null | tr -d '\\0' | wc -c")
            == "0"
        )


class TestConsoles:
    def test_hvc0_carries_bytes_both_ways(self, guest: LinuxGuest) -> None:
        carry_both_ways(
            guest, "/dev/hvc0", CONSOLE_BYTES, guest.vm.console.reader, guest.vm.console.writer
        )

    def test_serial_port_carries_bytes_both_ways(self, guest: LinuxGuest) -> None:
        data = os.urandom(SERIAL_BYTES)
        guest.check("kill -STOP $HEARTBEAT")
        # The commands come through the same port; now `head` reads it.
        guest.console.send(f"echo ready; head -c {SERIAL_BYTES} >/tmp/in; sha256sum /tmp/in\n")
        guest.console.expect("ready\n", timeout=60)
        guest.console.send(data)
        guest.console.expect(hashlib.sha256(data).hexdigest() + "  /tmp/in\n", timeout=600)
        guest.console.send("cat /tmp/in\n")
        assert read_exactly(guest.vm.serial.reader, SERIAL_BYTES) == data
        guest.check("kill -CONT $HEARTBEAT")


def test_power_off_ends_the_machine(guest: LinuxGuest) -> None:
    """The last test: the shared machine ends as it should."""
    outcome = guest.poweroff()
    assert (outcome.status, outcome.error) == (0, None)


def carry_both_ways(guest: LinuxGuest, terminal: str, count: int, reader: int, writer: int) -> None:
    """Random bytes into the guest's `terminal` and out of it again, with their checksum."""
    data = os.urandom(count)
    sender = threading.Thread(target=_write_all, args=(writer, data), daemon=True)
    mark = guest.start(
        f"exec 3<>{terminal}; stty raw -echo <&3; echo ready;"
        f"head -c {count} <&3 >/tmp/in; sha256sum /tmp/in; cat /tmp/in >&3"
    )
    guest.console.expect("ready\n", timeout=60)
    sender.start()
    back = read_exactly(reader, count)
    result = guest.finish(mark)
    sender.join()
    assert result.output.split()[0] == hashlib.sha256(data).hexdigest()
    assert back == data


def read_exactly(fd: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count and (more := os.read(fd, count - len(data))):
        data += more
    return bytes(data)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
