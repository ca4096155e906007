"""Guests on networks that need no root: the user network, and switches."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.linux_guest import BOOT_TIMEOUT, LinuxGuest, boot_tiny, image

import pyvmm

HOST = "10.0.2.2"
MIB = 1 << 20
DOWNLOAD = 32 * MIB
CONNECTIONS = 300

# What udhcpc does with a lease.
_ON_LEASE = """#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
ip route add default via $router
echo nameserver $dns >/etc/resolv.conf
echo lease $ip/$mask $router $dns $mtu
"""
_LEASE = f"""
mkdir -p /etc
cat >/tmp/on-lease <<'END'
{_ON_LEASE}END
chmod +x /tmp/on-lease
ip link set lo up
ip link set eth0 up
udhcpc -i eth0 -n -q -O mtu -s /tmp/on-lease
"""


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        listener.settimeout(BOOT_TIMEOUT)
        yield listener


def _serve(listener: socket.socket, count: int, answer: Callable[[socket.socket], None]) -> None:
    for _ in range(count):
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(60)
            answer(connection)


def _in_background(*args: object) -> threading.Thread:
    thread = threading.Thread(target=_serve, args=args)
    thread.start()
    return thread


def test_user_network(server: socket.socket) -> None:
    guest = boot_tiny(nets=["user,hostfwd=tcp::0-:23"])
    with guest.vm:
        lease = guest.check(_LEASE)
        assert "lease 10.0.2.15/24 10.0.2.2 10.0.2.3 65520" in lease
        assert guest.check("cat /sys/class/net/eth0/mtu") == "65520"
        assert " 0% packet loss" in guest.check(f"ping -c 3 {HOST}")
        _download(guest, server)
        _upload(guest, server)
        _connections(guest, server)
        _forwarded(guest)
        port = guest.vm.nets[0].port
        assert port.counters["dropped"] == port.counters["malformed"] == 0
        assert guest.poweroff().status == 0


def _download(guest: LinuxGuest, server: socket.socket) -> None:
    block = os.urandom(MIB)
    digest = hashlib.md5()

    def answer(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % DOWNLOAD)
        for _ in range(DOWNLOAD // MIB):
            connection.sendall(block)
            digest.update(block)

    thread = _in_background(server, 1, answer)
    port = server.getsockname()[1]
    said = guest.check(f"wget -q -O - http://{HOST}:{port}/data | md5sum", timeout=200)
    thread.join()
    assert said.split()[0] == digest.hexdigest()


def _upload(guest: LinuxGuest, server: socket.socket) -> None:
    size, digest = 0, hashlib.md5()

    def answer(connection: socket.socket) -> None:
        nonlocal size
        while data := connection.recv(MIB):
            size += len(data)
            digest.update(data)

    thread = _in_background(server, 1, answer)
    said = guest.check(
        f"head -c {32 * MIB} /dev/urandom >/tmp/data\n"
        f"nc {HOST} {server.getsockname()[1]} </tmp/data\nmd5sum /tmp/data",
        timeout=200,
    )
    thread.join()
    assert (size, digest.hexdigest()) == (32 * MIB, said.split()[0])


def _connections(guest: LinuxGuest, server: socket.socket) -> None:
    seen: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        seen.append(connection.recv(100))
        connection.sendall(seen[-1])

    thread = _in_background(server, CONNECTIONS, answer)
    port = server.getsockname()[1]
    said = guest.check(
        f"i=0; while [ $i -lt {CONNECTIONS} ]; do echo $i | nc {HOST} {port}; i=$((i + 1)); done"
        " | md5sum",
        timeout=200,
    )
    thread.join()
    numbers = b"".join(b"%d\n" % number for number in range(CONNECTIONS))
    assert b"".join(seen) == numbers
    assert said.split()[0] == hashlib.md5(numbers).hexdigest()


def _forwarded(guest: LinuxGuest) -> None:
    forward = guest.vm.nets[0].port.forwards[0]
    guest.check("nc -l -p 23 -e cat >/dev/null 2>&1 & sleep 1")
    with socket.create_connection((forward.host, forward.host_port), timeout=60) as client:
        client.sendall(b"through the host's port")
        assert client.recv(100) == b"through the host's port"


def test_two_guests_on_a_switch() -> None:
    with pyvmm.Switch() as switch:
        guests = [boot_tiny(nets=[f"switch={switch.path}"]) for _ in range(2)]
        for number, guest in enumerate(guests, 1):
            guest.check(f"ip addr add 10.9.8.{number}/24 dev eth0\nip link set eth0 up")
        one, two = guests
        assert " 0% packet loss" in one.check("ping -c 3 10.9.8.2")
        sent = one.check(f"head -c {16 * MIB} /dev/urandom >/tmp/data; md5sum /tmp/data")
        # An input without end: at its end nc would end the connection both ways.
        mark = two.start("mkfifo /tmp/open; exec 3<>/tmp/open; nc -l -p 5000 <&3 | md5sum")
        one.check("sleep 1; nc 10.9.8.2 5000 </tmp/data", timeout=200)
        got = two.finish(mark)
        assert got.output.split()[0] == sent.split()[0]
        assert switch.counters["ports"] == 2
        assert switch.counters["malformed"] == 0
        for guest in guests:
            assert guest.poweroff().status == 0
            guest.vm.close()


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh: apt install openssh-client")
def test_ssh_into_debian(image_disk: Callable[[str], Path], tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    files = image("debian")
    with pyvmm.VM(
        kernel=files.kernel,
        initrd=files.initrd,
        disks=[image_disk("debian")],
        nets=["user,hostfwd=tcp:127.0.0.1:0-:22"],
        serial="pipe",
    ) as vm:
        vm.start()
        guest = LinuxGuest(vm)
        guest.console.expect("debian login: ", timeout=BOOT_TIMEOUT)
        guest.console.send("root\n")
        guest.console.expect("root@debian:~# ", timeout=BOOT_TIMEOUT)
        guest.obey()
        public = key.with_suffix(".pub").read_text().strip()
        guest.check(f"mkdir -p ~/.ssh; echo '{public}' >~/.ssh/authorized_keys")
        guest.check("until networkctl status eth0 | grep -q 10.0.2.15; do sleep 1; done")
        assert guest.check("cat /sys/class/net/eth0/mtu") == "65520"
        forward = vm.nets[0].port.forwards[0]
        command = ["ssh", "-i", str(key), "-p", str(forward.host_port), "-F", "none"]
        command += ["-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={tmp_path}/hosts"]
        done = subprocess.run(
            [*command, "root@127.0.0.1", "uname -n; ip -br -4 addr show eth0"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        name, interface = done.stdout.splitlines()
        assert name == "debian"
        assert interface.split()[2] == "10.0.2.15/24"
