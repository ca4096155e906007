"""iSCSI devices behind virtio-scsi, against Debian's tgt on loopback."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.scsi_driver import CHECK_CONDITION, GOOD, ScsiDriver
from support.tgt import IQN, PASSWORD, Tgt, free_port, wait_until

from pyvmm.backends.scsi import iscsi
from pyvmm.backends.scsi.iscsi import IscsiDevice, IscsiUrl
from pyvmm.errors import UsageError
from pyvmm.virtio.scsi import VirtioScsi

SIZE = 8 << 20
TRANSPORT_FAILURE, ABORTED, FUNCTION_COMPLETE = 6, 2, 0
ABORT_TASK, LUN_RESET = 0, 5


@pytest.fixture(scope="module")
def shared_tgt() -> Iterator[Tgt]:
    if shutil.which("tgtd") is None or shutil.which("tgtadm") is None:
        pytest.skip("tgt is not installed: apt install tgt")
    if os.geteuid() != 0:
        pytest.skip("tgtd runs as root only")
    with tempfile.TemporaryDirectory() as name:
        tgt = Tgt(Path(name), SIZE)
        yield tgt
        tgt.stop()


@pytest.fixture
def tgt(shared_tgt: Tgt) -> Iterator[Tgt]:
    """The target, which is running again after a test."""
    yield shared_tgt
    if shared_tgt.process is None:
        shared_tgt.start()
    else:
        shared_tgt.thaw()


class Client(ScsiDriver):
    """A driver of the device at 0:0."""

    def __init__(self, url: str) -> None:
        self.unit = IscsiDevice(url)
        self.hba = VirtioScsi()
        self.hba.plug(0, 0, self.unit)
        super().__init__(self.hba)
        self.settle()

    def close(self) -> None:
        self.hba.unplug(0, 0)
        self.__exit__()
        self.unit.close()

    def write(self, lba: int, data: bytes) -> int:
        reply = self.command(write_10(lba, len(data) // 512), out=data)
        return reply.response << 8 | reply.status

    def read(self, lba: int, size: int) -> bytes:
        reply = self.command(read_10(lba, size // 512), into=size)
        assert (reply.response, reply.status) == (0, GOOD), reply
        return reply.data


def read_10(lba: int, blocks: int) -> bytes:
    return bytes((0x28, 0, *lba.to_bytes(4), 0, *blocks.to_bytes(2), 0))


def write_10(lba: int, blocks: int) -> bytes:
    return bytes((0x2A, 0, *lba.to_bytes(4), 0, *blocks.to_bytes(2), 0))


@pytest.fixture
def client(tgt: Tgt) -> Iterator[Client]:
    client = Client(tgt.url())
    yield client
    client.close()


class TestCommands:
    def test_data_go_both_ways(self, client: Client, tgt: Tgt) -> None:
        data = os.urandom(65536)
        assert client.write(100, data) == GOOD
        assert client.read(100, len(data)) == data
        assert tgt.disks[1].read_bytes()[100 * 512 :][: len(data)] == data

    def test_data_in_many_pieces(self, client: Client) -> None:
        data = os.urandom(8192)
        pieces = (data[:1], data[1:700], data[700:5000], data[5000:])
        assert client.command(write_10(7, 16), out=pieces).status == GOOD
        reply = client.command(read_10(7, 16), into=(3, 4097, 4092))
        assert (reply.status, reply.data) == (GOOD, data)

    def test_a_short_answer_leaves_a_residual(self, client: Client) -> None:
        reply = client.command(bytes((0x12, 0, 0, 0, 255, 0)), into=255)
        assert (reply.status, reply.data[8:16]) == (GOOD, b"IET     ")
        assert reply.transferred == reply.data[4] + 5 < 255

    def test_sense_data(self, client: Client) -> None:
        end = SIZE // 512
        reply = client.command(read_10(end, 1), into=512)
        assert (reply.response, reply.status, reply.code) == (0, CHECK_CONDITION, (5, 0x21, 0))
        assert client.command(bytes((0xFF, *bytes(15)))).code == (5, 0x20, 0)

    def test_what_reaches_beyond_the_unit_is_refused(self, client: Client) -> None:
        for opcode in (0x83, 0x84):
            assert client.command(bytes((opcode, 0x11, *bytes(14)))).code == (5, 0x20, 0)
        sessions = client.unit.counters["commands"]
        long = bytes((0x7F, 0, 0, 0, 0, 0, 0, 24, 0, 9, *bytes(22)))
        assert client.command(long, into=512).code == (5, 0x24, 0)  # the library's limit
        assert client.unit.counters["commands"] == sessions

    def test_block_limits_are_lowered(self, client: Client) -> None:
        reply = client.command(bytes((0x12, 1, 0xB0, 0, 64, 0)), into=64)
        assert reply.status == GOOD
        assert int.from_bytes(reply.data[8:12]) == (16 << 20) // 512

    def test_flat_addresses(self, tgt: Tgt) -> None:
        with pytest.raises(UsageError):
            IscsiDevice(tgt.url(299))
        client = Client(tgt.url(300))
        assert client.write(0, b"three hundred".ljust(512, b"\0")) == GOOD
        client.close()
        assert tgt.disks[300].read_bytes().startswith(b"three hundred")

    def test_chap(self, tgt: Tgt) -> None:
        client = Client(tgt.url(target="locked", login=f"me%{PASSWORD}@"))
        assert client.read(0, 512) == bytes(512)
        client.close()

    def test_chap_from_the_environment(self, tgt: Tgt, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LIBISCSI_CHAP_USERNAME", "me")
        monkeypatch.setenv("LIBISCSI_CHAP_PASSWORD", PASSWORD)
        IscsiDevice(tgt.url(target="locked")).close()

    def test_many_at_once(self, client: Client) -> None:
        ring = client.driver.queues[2]
        assert ring is not None
        heads = [
            client.start((client.header(read_10(n, 32), address()),), (108, 16384))
            for n in range(5)
        ]
        used: list[int] = []
        wait_until(lambda: used.extend(each.written for each in ring.collect()) or len(used) == 5)
        assert len(set(heads)) == 5
        assert used == [108 + 16384] * 5


def address() -> bytes:
    return bytes((1, 0, 0x40, 0, 0, 0, 0, 0))


class TestLostConnections:
    def test_commands_wait_for_the_target_to_come_back(self, client: Client, tgt: Tgt) -> None:
        assert client.write(0, b"x" * 512) == GOOD
        tgt.stop()
        wait_until(lambda: not client.unit.connected)
        threading.Timer(1.5, tgt.start).start()
        start = time.monotonic()
        client.settle()  # the target says that it has started
        assert client.read(0, 512) == b"x" * 512
        assert time.monotonic() - start > 1
        assert client.unit.counters["sessions"] == 2
        assert client.unit.counters["failed"] == 0

    def test_a_command_under_way_fails_at_once(self, client: Client, tgt: Tgt) -> None:
        tgt.freeze()
        ring = client.driver.queues[2]
        assert ring is not None
        client.start((client.header(read_10(0, 1), address()),), (108, 512))
        time.sleep(0.2)
        start = time.monotonic()
        tgt.stop()
        used: list[object] = []
        wait_until(lambda: used.extend(ring.collect()) or used)
        assert time.monotonic() - start < 5
        assert client.unit.counters["failed"] == 1

    def test_what_waits_too_long_fails(self, tgt: Tgt, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(iscsi, "WAIT_SECONDS", 2)
        client = Client(tgt.url())
        tgt.stop()
        wait_until(lambda: not client.unit.connected)
        start = time.monotonic()
        reply = client.command(read_10(0, 1), into=512)
        assert reply.response == TRANSPORT_FAILURE
        assert 1 < time.monotonic() - start < 6
        client.close()

    def test_a_target_that_is_silent_is_given_up(
        self, tgt: Tgt, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(iscsi, "PING_SECONDS", 1)
        client = Client(tgt.url())
        tgt.freeze()
        wait_until(lambda: not client.unit.connected)
        tgt.thaw()
        wait_until(lambda: client.unit.connected)
        client.settle()
        assert client.read(0, 512)
        client.close()

    def test_the_end_does_not_wait(self, tgt: Tgt) -> None:
        for how in (tgt.freeze, tgt.stop):
            client = Client(tgt.url())
            how()
            client.start((client.header(write_10(0, 1), address()), bytes(512)), (108,))
            client.start((client.header(read_10(0, 1), address()),), (108, 512))
            time.sleep(0.2)
            start = time.monotonic()
            client.close()
            assert time.monotonic() - start < 12
            tgt.thaw() if tgt.process else tgt.start()


class TestTaskManagement:
    def test_abort_of_a_read(self, client: Client, tgt: Tgt) -> None:
        self._abort(client, tgt, client.header(read_10(0, 1), address(), 77), (), (108, 512))

    def test_abort_of_a_write(self, client: Client, tgt: Tgt) -> None:
        threading.Timer(2, tgt.thaw).start()
        header = client.header(write_10(0, 1), address(), 77)
        self._abort(client, tgt, header, (bytes(512),), (108,))

    def _abort(
        self,
        client: Client,
        tgt: Tgt,
        header: bytes,
        out: tuple[bytes, ...],
        into: tuple[int, ...],
    ) -> None:
        ring = client.driver.queues[2]
        assert ring is not None
        tgt.freeze()
        buffers = ring._in_flight[client.start((header, *out), into)].writable
        time.sleep(0.2)
        assert client.manage(ABORT_TASK, tag=77) == FUNCTION_COMPLETE
        used: list[object] = []
        wait_until(lambda: used.extend(ring.collect()) or used)
        response = client.parse(ring.read(*buffers[0]), 108, 512).response
        tgt.thaw()
        # The target may have been quicker than the abort.
        assert response in (ABORTED, 0)
        client.settle()
        assert client.read(0, 512)

    def test_reset(self, client: Client, tgt: Tgt) -> None:
        tgt.freeze()
        client.start((client.header(read_10(0, 1), address()),), (108, 512))
        time.sleep(0.2)
        assert client.manage(LUN_RESET) == FUNCTION_COMPLETE
        tgt.thaw()
        # The target tells of its reset whenever it has come to it.
        wait_until(lambda: client.command(read_10(0, 1), into=512).status == GOOD)


class TestErrors:
    def refusal(self, url: str) -> str:
        with pytest.raises(UsageError) as caught:
            IscsiDevice(url)
        return str(caught.value)

    @pytest.mark.parametrize(
        "url",
        [
            "iscsi:/host/iqn.a/1",
            "iscsi://",
            "iscsi://host",
            "iscsi://host/iqn.a",
            "iscsi://host/iqn.a/",
            "iscsi://host/iqn.a/x",
            "iscsi://host/iqn.a/-1",
            "iscsi:///iqn.a/1",
            "iscsi://host:/iqn.a/1",
            "iscsi://host:x/iqn.a/1",
            "iscsi://host:0/iqn.a/1",
            "iscsi://host:65536/iqn.a/1",
            "iscsi://host/disk/1",
            "iscsi://[::1/iqn.a/1",
            "iscsi://[::1]x/iqn.a/1",
        ],
    )
    def test_malformed(self, url: str) -> None:
        assert self.refusal(url) == (
            f"{url} is not the URL of an iSCSI device: "
            "write iscsi://[USER%PASSWORD@]HOST[:PORT]/IQN/LUN"
        )

    def test_a_password_is_not_shown(self) -> None:
        assert self.refusal("iscsi://me%secret@host/x") == (
            "iscsi://me%...@host/x is not the URL of an iSCSI device: "
            "write iscsi://[USER%PASSWORD@]HOST[:PORT]/IQN/LUN"
        )

    def test_a_lun_that_there_cannot_be(self) -> None:
        assert self.refusal("iscsi://host/iqn.a/16384") == (
            "iscsi://host/iqn.a/16384: there is no LUN 16384: give one from 0 to 16383"
        )

    def test_unreachable(self) -> None:
        port = free_port()
        assert self.refusal(f"iscsi://127.0.0.1:{port}/iqn.a/1") == (
            f"the iSCSI target at 127.0.0.1:{port} cannot be reached (Connection refused): "
            "check the address, and that the target runs there"
        )

    def test_an_unknown_host(self) -> None:
        message = self.refusal("iscsi://no-such-host.invalid/iqn.a/1")
        assert message.startswith(
            "the iSCSI target at no-such-host.invalid:3260 cannot be reached ("
        )
        assert message.endswith("): check the address, and that the target runs there")

    def test_something_else_answers(self, listener: Callable[[bytes | None], int]) -> None:
        port = listener(None)
        assert self.refusal(f"iscsi://127.0.0.1:{port}/iqn.a/1") == (
            f"no session with the iSCSI target iqn.a at 127.0.0.1:{port} "
            "(it closed the connection): check that the target is one"
        )

    def test_nobody_says_a_word(
        self, listener: Callable[[bytes | None], int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(iscsi, "CONNECT_TIMEOUT", 1)
        port = listener(b"")
        assert self.refusal(f"iscsi://127.0.0.1:{port}/iqn.a/1") == (
            f"no session with the iSCSI target iqn.a at 127.0.0.1:{port} "
            "(no answer): check that the target is one"
        )

    def test_no_such_target(self, tgt: Tgt) -> None:
        assert self.refusal(tgt.url(target="other")) == (
            f"there is no iSCSI target {IQN}:other at 127.0.0.1:{tgt.port}: "
            f"iscsi-ls iscsi://127.0.0.1:{tgt.port} lists those there are"
        )

    def test_no_such_lun(self, tgt: Tgt) -> None:
        assert self.refusal(tgt.url(2)) == (
            f"the iSCSI target {IQN}:open at 127.0.0.1:{tgt.port} has no LUN 2: "
            f"iscsi-ls -s iscsi://127.0.0.1:{tgt.port} lists those it has"
        )

    @pytest.mark.parametrize("login", ["", "me%a-wrong-secret@", f"you%{PASSWORD}@"])
    def test_a_wrong_password(self, tgt: Tgt, login: str) -> None:
        place = f"127.0.0.1:{tgt.port}"
        assert self.refusal(tgt.url(target="locked", login=login)) == (
            f"the iSCSI target {IQN}:locked at {place} refuses the login: check user and password "
            f"in iscsi://USER%PASSWORD@{place}/..., and that it lets {iscsi.initiator_name()} in"
        )

    def test_without_libiscsi(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pyvmm._iscsi", None)
        assert self.refusal("iscsi://host/iqn.a/1") == (
            "an iSCSI device needs libiscsi, which this pyvmm was built without: "
            "install libiscsi-dev and run scripts/setup"
        )


@pytest.fixture
def listener() -> Iterator[Callable[[bytes | None], int]]:
    """Listens on a port, which is returned, and closes what comes, or (not None) is silent."""
    server = socket.create_server(("127.0.0.1", 0))
    kept: list[socket.socket] = []

    def accept(silent: bool) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            kept.append(connection) if silent else connection.close()

    def listen(words: bytes | None) -> int:
        threading.Thread(target=accept, args=(words is not None,), daemon=True).start()
        port: int = server.getsockname()[1]
        return port

    yield listen
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    for each in kept:
        each.close()


class TestUrl:
    def test_parts(self) -> None:
        url = IscsiUrl("iscsi://me%p@ss%word@[fe80::1]:99/iqn.2026-11.a%3Ab/7")
        assert (url.user, url.password) == ("me", "p@ss%word")
        assert (url.host, url.port, url.place) == ("fe80::1", 99, "[fe80::1]:99")
        assert (url.target, url.lun) == ("iqn.2026-11.a:b", 7)
        plain = IscsiUrl("iscsi://host/eui.1234/16383")
        assert (plain.user, plain.password, plain.place, plain.lun) == ("", "", "host:3260", 16383)

    def test_initiator_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "initiatorname.iscsi"
        path.write_text("## the name\nInitiatorName=iqn.1993-08.org.debian:01:abc\n")
        monkeypatch.setattr(iscsi, "_INITIATOR_FILE", str(path))
        assert iscsi.initiator_name() == "iqn.1993-08.org.debian:01:abc"
        path.write_text("GenerateName=yes\n")
        assert iscsi.initiator_name().startswith("iqn.2026-11.io.pyvmm:")
