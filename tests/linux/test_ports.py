"""Named ports of a real guest: bulk each way, many at once, coming and going, and the agent."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.linux_guest import LinuxGuest, boot_tiny, image

from pyvmm.guest.agent import AgentError, GuestAgent

MIB = 1 << 20
# Of each direction; more takes minutes in the emulated machine.
BULK = 16 * MIB
MANY = 30
AGENT = "org.qemu.guest_agent.0"

# Prints the device file of the port $1: an initramfs has no udev that would make symbolic links.
_FIND = """
port() {
    for p in /sys/class/virtio-ports/*; do
        if [ "$(cat $p/name 2>/dev/null)" = "$1" ]; then echo /dev/${p##*/}; fi
    done
}"""


@pytest.fixture(scope="module")
def guest() -> Iterator[LinuxGuest]:
    disk = {"path": image("debian").disk, "snapshot": True}
    guest = boot_tiny(ports=["bulk"], max_ports=MANY + 2, disks=[disk])
    yield guest
    guest.vm.close()


def run(guest: LinuxGuest, script: str) -> str:
    return guest.check(f"{_FIND}\n{script}")


def start(guest: LinuxGuest, script: str) -> str:
    return guest.start(f"set -e\n{_FIND}\n{script}")


def finish(guest: LinuxGuest, mark: str) -> str:
    status, output = guest.finish(mark)
    assert status == 0, output
    return output.strip()


def test_to_a_guest_that_stalls(guest: LinuxGuest) -> None:
    """And which reads in odd pieces."""
    chance = random.Random(1)
    digest = hashlib.sha256()
    # The subshell reads, and stops now and then; what is left unread waits.
    mark = start(
        guest,
        f"""exec 3<$(port bulk)
        for size in 1 70000 3 1000000 4096; do
            dd bs=$size count=1 iflag=fullblock <&3 2>/dev/null; usleep 200000
        done >/tmp/start
        head -c {BULK - 1 - 70000 - 3 - 1000000 - 4096} <&3 | cat /tmp/start - | sha256sum""",
    )
    with guest.vm.port("bulk") as port:
        port.wait_open(timeout=60)
        sent = 0
        while sent < BULK:
            data = chance.randbytes(min(BULK - sent, chance.randrange(1, 500_000)))
            digest.update(data)
            assert port.write(data, timeout=120) == len(data)
            sent += len(data)
        assert finish(guest, mark).split()[0] == digest.hexdigest()


def test_from_a_guest_whose_reader_stalls(guest: LinuxGuest) -> None:
    chance = random.Random(2)
    digest = hashlib.sha256()
    with guest.vm.port("bulk") as port:
        mark = start(
            guest,
            f"head -c {BULK} /dev/urandom >/tmp/data; sha256sum </tmp/data; "
            "dd if=/tmp/data of=$(port bulk) bs=50000 2>/dev/null; rm /tmp/data",
        )
        received = 0
        while received < BULK:
            data = port.read(chance.randrange(1, 300_000), timeout=120)
            digest.update(data)
            received += len(data)
            if chance.random() < 0.02:
                time.sleep(0.1)
        assert finish(guest, mark).split()[0] == digest.hexdigest()


def test_a_reader_that_stops_stops_the_guest(guest: LinuxGuest) -> None:
    """And memory does not grow by what waits."""
    with guest.vm.port("bulk") as port:
        mark = start(guest, "dd if=/dev/zero of=$(port bulk) bs=32768 count=512 2>/dev/null")
        port.wait_open(timeout=60)
        time.sleep(2)
        before = resident()
        time.sleep(2)
        assert resident() - before < 2 * MIB
        assert port.guest_open  # it has not got through
        received = 0
        while received < 16 * MIB:
            received += len(port.read(timeout=120))
        finish(guest, mark)


def resident() -> int:
    """Bytes of this process in memory that is its own: sockets' are the kernel's."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def test_many_ports_at_once(guest: LinuxGuest) -> None:
    """Each echoes what it gets, all at the same time."""
    names = [f"many.{n}" for n in range(MANY)]
    for name in names:
        guest.vm.add_port(name)
    try:
        seen = run(guest, "sleep 1; cat /sys/class/virtio-ports/*/name").split()
        assert set(names) <= set(seen)
        mark = start(
            guest,
            """for p in /sys/class/virtio-ports/*; do
                case $(cat $p/name) in many.*)
                    (exec 3<>/dev/${p##*/}; head -c 50000 <&3 >/tmp/${p##*/}
                    cat /tmp/${p##*/} >&3) & ;;
                esac
            done
            wait $(jobs -p)""",
        )
        failures: list[str] = []

        def talk(name: str) -> None:
            data = random.Random(name).randbytes(50_000)
            with guest.vm.port(name) as port:
                port.write(data, timeout=200)
                back = b""
                while len(back) < len(data):
                    back += port.read(timeout=200)
                if back != data:
                    failures.append(name)

        threads = [threading.Thread(target=talk, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        finish(guest, mark)
        assert failures == []
    finally:
        for name in names:
            guest.vm.remove_port(name)
    run(guest, "while [ $(ls /sys/class/virtio-ports | wc -l) -gt 1 ]; do usleep 100000; done")


def test_each_side_sees_the_other(guest: LinuxGuest) -> None:
    events: list[tuple[object, object]] = []
    guest.vm.on_event(
        lambda event: (
            events.append((event.data["id"], event.data["open"]))
            if event.name == "VSERPORT_CHANGE"
            else None
        )
    )
    guest.vm.add_port("visits")
    with guest.vm.port("visits") as port:
        mark = start(guest, "sleep 1; exec 3<$(port visits); cat <&3; echo the end; sleep 1")
        port.wait_open(timeout=60)
        assert guest.vm.ports["visits"].guest_open
        port.write(b"hello ")
    # What was sent arrives, then the end of the file.
    assert finish(guest, mark) == "hello the end"
    assert events == [("visits", True), ("visits", False)]
    # A port that goes while a program reads it ends that.
    with guest.vm.port("visits") as port:
        mark = start(guest, "cat $(port visits) || true; echo gone")
        port.wait_open(timeout=60)
        guest.vm.remove_port("visits")
        assert finish(guest, mark).endswith("gone")
    assert run(guest, "port visits") == ""


def test_a_second_console_and_its_window(guest: LinuxGuest) -> None:
    guest.vm.add_port("second", console=True)
    run(guest, "sleep 1; exec 3<>/dev/hvc0; stty raw -echo <&3; (head -c 5 <&3; echo >&3 done) &")
    with guest.vm.port("second") as port:
        port.write(b"hello")
        output = b""
        while b"done" not in output:
            output += port.read(timeout=60)
    guest.vm.remove_port("second")


@pytest.fixture(scope="module")
def agent(guest: LinuxGuest) -> Iterator[GuestAgent]:
    """Debian's agent on Debian's disk, in a chroot: a boot of all of it takes a minute."""
    guest.vm.add_port(AGENT)
    run(
        guest,
        f"""sleep 1; mkdir -p /mnt; mount /dev/vda /mnt
        mount -t proc proc /mnt/proc; mount --bind /dev /mnt/dev; mount -t tmpfs run /mnt/run
        chroot /mnt /usr/sbin/qemu-ga -d -m virtio-serial -p $(port {AGENT})""",
    )
    with GuestAgent(guest.vm.port(AGENT), timeout=120) as agent:
        agent.wait(timeout=120)
        yield agent


def test_the_agent_runs_programs(agent: GuestAgent) -> None:
    agent.ping()
    commands = {each["name"] for each in agent.execute("guest-info")["supported_commands"]}
    assert {"guest-exec", "guest-file-read", "guest-fsfreeze-freeze"} <= commands
    result = agent.run("/bin/sh", "-c", "cat; echo error >&2; exit 3", stdin=b"input", timeout=100)
    assert (result.status, result.output, result.errors) == (3, b"input", b"error\n")
    killed = agent.run("/bin/sh", "-c", "kill -9 $$", timeout=100)
    assert (killed.status, killed.signal) == (None, 9)
    with pytest.raises(AgentError, match="guest-exec: "):
        agent.run("/no/such/program")


def test_the_agent_moves_files(agent: GuestAgent) -> None:
    data = random.Random(3).randbytes(1_500_000)
    agent.write_file("/root/data", data)
    summed = agent.run("/usr/bin/sha256sum", "/root/data", timeout=100).output
    assert summed.split()[0].decode() == hashlib.sha256(data).hexdigest()
    assert agent.read_file("/root/data") == data
    with pytest.raises(AgentError, match="failed to open file '/no/such'"):
        agent.read_file("/no/such")


def test_the_agent_freezes_file_systems(guest: LinuxGuest, agent: GuestAgent) -> None:
    assert not agent.frozen
    assert agent.freeze() == 1
    try:
        assert agent.frozen
        run(guest, "(echo written >/mnt/root/frozen; touch /tmp/written) & sleep 3")
        assert run(guest, "ls /tmp/written 2>/dev/null || true") == ""
    finally:
        assert agent.thaw() == 1
    run(guest, "while [ ! -e /tmp/written ]; do usleep 100000; done")
    assert not agent.frozen
