"""passt as the backend of a network, with the kernel's own network stack as its guest."""

from __future__ import annotations

import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.guest_stack import GuestStack

from pyvmm.backends.forward import Forward
from pyvmm.backends.passt import Passt
from pyvmm.errors import UsageError

needs_passt = pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")

# passt wants a host with an address and a default route, so it gets one.
HOST_ADDRESS, ROUTER = "192.0.2.10", "192.0.2.1"
IN_A_NAMESPACE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from unit import test_passt
test_passt.talk()
"""
SETUP = f"""
ip link set lo up
ip tuntap add up0 mode tap
ip addr add {HOST_ADDRESS}/24 dev up0
ip link set up0 up
ip route add default via {ROUTER}
exec "$0" -c "$1"
"""


def talk() -> None:
    """Runs in namespaces of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    passt = Passt(forwards=[Forward.from_text(f"tcp::{port}-:22")], ipv6=False)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        GuestStack(passt.fds[0], mtu=passt.mtu, stream=True) as guest,
    ):
        guest.up(f"{HOST_ADDRESS}/24", ROUTER)
        with guest.connect(ROUTER, server.getsockname()[1]) as in_guest:
            on_host, _ = server.accept()
            for number in range(200):
                in_guest.sendall(b"%d" % number)
                on_host.sendall(on_host.recv(100) + b", from the host")
                answer = in_guest.recv(100).decode()
            print(answer)
        # Now that passt has heard of the guest.
        listener = guest.listen(22)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"to the guest")
            connection, _ = listener.accept()
            print(connection.recv(100).decode())
    passt.close()


@needs_passt
def test_connections_both_ways() -> None:
    unshare = ["unshare", "--map-root-user", "--mount", "--net", "--"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("user namespaces are not permitted here")
    done = subprocess.run(
        [*unshare, "sh", "-e", "-c", SETUP, sys.executable, IN_A_NAMESPACE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "199, from the host\nto the guest\n", done.stderr


def processes() -> set[int]:
    return {
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/comm")
        if "passt" in _text(path) and " Z " not in _text(path.with_name("stat"))
    }


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which programs are looked for first."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def error_of(**settings: object) -> str:
    with pytest.raises(UsageError) as caught:
        Passt(**settings)
    return str(caught.value)


@needs_passt
def test_it_ends_with_the_port(fake: Path) -> None:
    before = processes()
    try:
        passt = Passt()
    except UsageError as error:
        assert "External interface not usable" in str(error)
        pytest.skip(f"this machine has no default route: {error}")
    deadline = time.monotonic() + 10
    assert processes() - before
    passt.close()
    while processes() - before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_options(fake: Path) -> None:
    program(fake / "passt", f'shift 2; echo "$@" >{fake}/options')
    rules = ["tcp::2222-:22", "tcp:0.0.0.0:80-:8080", "udp::53-:53"]
    forwards = [Forward.from_text(rule) for rule in rules]
    port = Passt(mtu=9000, loopback=False, ipv6=False, forwards=forwards)
    port.close()
    assert (fake / "options").read_text().split() == [
        *("--quiet", "--mtu", "9000", "--no-map-gw", "--ipv4-only"),
        *("--tcp-ports", "127.0.0.1/2222:22", "--tcp-ports", "0.0.0.0/80:8080"),
        *("--udp-ports", "127.0.0.1/53:53"),
    ]
    port = Passt()
    port.close()
    assert (fake / "options").read_text().split() == [
        *("--quiet", "--mtu", "65520", "--tcp-ports", "none", "--udp-ports", "none")
    ]


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert error_of() == "passt is not installed: install the package passt, or use --net user"


def test_what_it_says_when_it_fails(fake: Path) -> None:
    program(
        fake / "passt", "echo 'Failed to send 47 bytes to syslog' >&2; echo 'No luck' >&2; exit 1"
    )
    assert error_of() == "passt cannot serve this network: No luck (or use --net user)"
    program(fake / "passt", "exit 3")
    assert error_of() == "passt cannot serve this network: status 3 (or use --net user)"


@needs_passt
def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        error = error_of(forwards=[Forward.from_text(f"tcp::{port}-:22")])
    if "External interface not usable" in error:
        pytest.skip(f"this machine has no default route: {error}")
    assert error == (
        f"passt cannot serve this network: Failed to bind any port for '-t 127.0.0.1/{port}:22' "
        "(or use --net user)"
    )


@pytest.mark.parametrize("rule", ["tcp:127.0.0.1:0-:22", "tcp:127.0.0.1:22-10.0.2.15:22"])
def test_rules_that_passt_does_not_know(rule: str) -> None:
    assert error_of(forwards=[Forward.from_text(rule)]) == (
        f"hostfwd={rule}: passt chooses no port, and knows one guest only: "
        "give one such as tcp:127.0.0.1:2222-:22"
    )
