"""The control socket and its commands, with a machine that only writes down what it was told."""

from __future__ import annotations

import json
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mmio_driver import wait_until
from support.qmp_client import RawClient, error_of

from pyvmm.config import ChardevConfig, DiskConfig, VmConfig
from pyvmm.control import server as server_module
from pyvmm.control.commands import COMMANDS, Control
from pyvmm.control.protocol import QmpError, encode
from pyvmm.control.server import MAX_CLIENTS, QmpServer
from pyvmm.errors import UsageError
from pyvmm.machine.events import Event

MIB = 1 << 20


def fake_image(name: str, **values: object) -> SimpleNamespace:
    plain = {"format": "raw", "readonly": False, "size": 16 * MIB, "limits": (0, 0)}
    return SimpleNamespace(name=name, **{**plain, **values})


class FakeMachine:
    """Stands for `pyvmm.machine.vm.VM`."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.listeners: list[Callable[[Event], None]] = []
        self.config = VmConfig(kernel="k", serial=ChardevConfig(kind="pty"), console="unix:/c")
        self.serial = SimpleNamespace(description="pseudo-terminal /dev/pts/7")
        self.console = SimpleNamespace(description="socket /c")
        self.state = "running"
        self.cpu_threads = [101, 102]
        self.nets = [SimpleNamespace(name="net0"), SimpleNamespace(name="net1")]
        self.disks: dict[str, Any] = {
            "vda": (DiskConfig(path="a.img"), fake_image("a.img", limits=(500, 0))),
            "0:3": (
                DiskConfig(path="b.qcow2", bus="scsi", cache="writethrough", direct=True),
                fake_image("b.qcow2", format="qcow2", readonly=True),
            ),
        }
        self.balloon: Any = None
        self.ports: dict[str, Any] = {
            "agent": SimpleNamespace(address="unix:/a", guest_open=False),
        }
        self.cdroms: dict[str, Any] = {
            "cd0": SimpleNamespace(path=None, size=0, tray_open=True, locked=False),
        }

    def on_event(self, listener: Callable[[Event], None]) -> None:
        self.listeners.append(listener)

    def tell(self, name: str, **data: object) -> None:
        for listener in self.listeners:
            listener(Event(name, data))

    def pause(self) -> None:
        self.state = "paused"
        self.tell("STOP")

    def resume(self) -> None:
        self.state = "running"
        self.tell("RESUME")

    def request_stop(self, status: int = 0, reason: str = "") -> None:
        self.tell("SHUTDOWN", guest=False, reason=reason)

    def reset(self) -> None:
        self.tell("RESET", guest=False)

    def add_scsi_disk(self, **settings: Any) -> tuple[int, int]:
        config = DiskConfig(**settings, bus="scsi")
        place = config.target or 0, 8 if config.lun is None else config.lun
        self.disks[f"{place[0]}:{place[1]}"] = (config, fake_image(config.location))
        self.calls.append(("add", settings))
        return place

    def remove_scsi_disk(self, target: int, lun: int) -> None:
        del self.disks[f"{target}:{lun}"]
        self.tell("DEVICE_DELETED", device=f"{target}:{lun}")

    def add_port(self, name: str, **settings: Any) -> None:
        self.calls.append(("add_port", name, settings))
        self.ports[name] = SimpleNamespace(address="pty", guest_open=True)

    def remove_port(self, name: str) -> None:
        del self.ports[name]
        self.tell("DEVICE_DELETED", device=name)

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*args: object, **keywords: object) -> None:
            self.calls.append((name, *args, *keywords.items()))

        if name.startswith("_"):
            raise AttributeError(name)
        return call


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


@pytest.fixture
def path(tmp_path: Path, machine: FakeMachine) -> Iterator[Path]:
    """The socket of a server that controls `machine`."""
    path = tmp_path / "qmp"
    server = QmpServer(str(path), machine)  # type: ignore[arg-type]
    server.start()
    yield path
    server.close()


@pytest.fixture
def client(path: Path) -> Iterator[RawClient]:
    with RawClient(path) as client:
        yield client


class TestSession:
    def test_the_greeting(self, path: Path) -> None:
        with RawClient(path, negotiate=False) as client:
            version = client.greeting["QMP"]["version"]
            assert set(version["qemu"]) == {"major", "minor", "micro"}
            assert all(type(number) is int for number in version["qemu"].values())
            assert version["package"].startswith("pyvmm ")
            assert client.greeting["QMP"]["capabilities"] == []

    def test_nothing_works_before_the_capabilities(self, path: Path, machine: FakeMachine) -> None:
        with RawClient(path, negotiate=False) as client:
            too_early = "qmp_capabilities has to come before any other command"
            assert client.refusal("stop") == ("CommandNotFound", too_early)
            assert client.refusal("qmp_capabilities", enable=["oob"]) == (
                "GenericError",
                "there is no capability 'oob': the greeting lists none",
            )
            assert client.refusal("stop") == ("CommandNotFound", too_early)
            assert client.execute("qmp_capabilities", enable=[]) == {}
            assert client.execute("stop") == {}
        assert machine.state == "paused"

    def test_capabilities_come_once(self, client: RawClient) -> None:
        assert client.refusal("qmp_capabilities") == (
            "CommandNotFound",
            "qmp_capabilities was there already",
        )

    def test_ids_come_back_whatever_they_are(self, client: RawClient) -> None:
        ids: list[object] = [7, "x", None, {"a": [1]}, 1.5, False, "ä"]
        for id in ids:  # all at once
            client.send(json.dumps({"execute": "query-status", "id": id}).encode())
            client.send(json.dumps({"execute": "nonsense", "id": id}).encode() + b"\n")
            client.send(json.dumps({"id": id}).encode())
        for id in ids:
            answers = [client.answer() for _ in range(3)]
            assert [answer["id"] for answer in answers] == [id] * 3
            assert answers[0]["return"]["status"] == "running"
            assert error_of(answers[1])[0] == "CommandNotFound"
            assert error_of(answers[2])[0] == "GenericError"
        assert "id" not in client.ask("query-status")

    def test_garbage_is_answered_and_survived(self, client: RawClient) -> None:
        for garbage in (b"hello\n", b"\xff\x00\n", b"{]\n", b"7\n", b'{"execute": 1}', b'{"a\n'):
            client.send(garbage)
            assert error_of(client.answer())[0] == "GenericError"
        client.send(b'{"execute": "' + b"x" * (2 * MIB) + b'"}\n')
        assert error_of(client.answer())[1].startswith("a request has at most 1048576 bytes")
        assert client.execute("query-status")["running"] is True

    def test_what_was_asked_before_the_end_is_answered(self, path: Path) -> None:
        with RawClient(path, negotiate=False) as client:
            client.send(b'{"execute": "qmp_capabilities"}{"execute": "query-status"}{"ex')
            client.socket.shutdown(socket.SHUT_WR)
            assert client.receive() == {"return": {}}
            assert client.receive()["return"]["status"] == "running"
            with pytest.raises(EOFError):
                client.receive()

    def test_a_defect_is_an_error_of_its_command(
        self, client: RawClient, machine: FakeMachine, caplog: pytest.LogCaptureFixture
    ) -> None:
        machine.config = None  # type: ignore[assignment]
        kind, sentence = client.refusal("query-chardev")
        assert kind == "GenericError"
        assert sentence.startswith("a defect in pyvmm: AttributeError(")
        assert "the command query-chardev failed" in caplog.text
        assert client.execute("query-status")["running"] is True


class TestArguments:
    @pytest.mark.parametrize(
        ("command", "arguments", "kind", "sentence"),
        [
            ("stpo", {}, "CommandNotFound", "there is no command 'stpo', did you mean 'stop'?"),
            (
                "x" * 100_000,
                {},
                "CommandNotFound",
                f"there is no command '{'x' * 40}' (query-commands lists them)",
            ),
            ("stop", {"now": 1}, "GenericError", "stop has no argument 'now': it has none"),
            (
                "set_link",
                {"name": "net0", "up": True, "x": 1},
                "GenericError",
                "set_link has no argument 'x': it has name, up",
            ),
            ("set_link", {"name": "net0"}, "GenericError", "set_link needs an argument 'up'"),
            (
                "set_link",
                {"name": "net0", "up": 1},
                "GenericError",
                "'up' of set_link is true or false",
            ),
            (
                "set_link",
                {"name": 0, "up": True},
                "GenericError",
                "'name' of set_link is a string",
            ),
            (
                "block_resize",
                {"device": "vda", "size": True},
                "GenericError",
                "'size' of block_resize is a whole number",
            ),
            (
                "block_resize",
                {"device": "vda", "size": 1.0},
                "GenericError",
                "'size' of block_resize is a whole number",
            ),
        ],
    )
    def test_what_is_wrong(
        self,
        client: RawClient,
        command: str,
        arguments: dict[str, object],
        kind: str,
        sentence: str,
    ) -> None:
        assert client.refusal(command, **arguments) == (kind, sentence)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
NAMES = ["vda", "0:3", "cd0", "net0", "agent", "scsi-hd", "virtserialport", "raw", "file"]
OPEN = "drive chardev bus scsi-id lun serial cache file filename read-only unix discard path"
words = sorted({word for command in COMMANDS.values() for word in command.arguments})
words += OPEN.split()


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(COMMANDS.keys() - {"quit", "system_reset", "qmp_capabilities"})),
    st.booleans(),
    st.dictionaries(st.sampled_from(words), json_values | st.sampled_from(NAMES)),
)
def test_any_arguments_are_answered_without_a_defect(
    name: str, plug: bool, arguments: dict[str, object]
) -> None:
    if plug:
        name, driver = "device_add", "virtserialport" if "name" in arguments else "scsi-hd"
        arguments = {**arguments, "driver": driver, "id": "x"}
    control = Control(FakeMachine())  # type: ignore[arg-type]
    try:
        command, read = control.find(name, arguments, True)
        encode({"return": control.execute(command, read)})
    except QmpError as error:
        assert "a defect in pyvmm" not in str(error)


class TestCommands:
    def test_each_has_a_line_of_help(self) -> None:
        for command in COMMANDS.values():
            assert command.help, command.name
            assert not command.help.endswith(".")

    def test_all_are_listed(self, client: RawClient) -> None:
        listed = {each["name"] for each in client.execute("query-commands")}
        assert listed == set(COMMANDS)
        assert {"stop", "cont", "block_resize", "query-cpus-fast", "qmp_capabilities"} <= listed

    def test_status(self, client: RawClient, machine: FakeMachine) -> None:
        assert client.execute("query-status") == {"status": "running", "running": True}
        machine.state = "io-error"
        assert client.execute("query-status") == {"status": "io-error", "running": False}

    def test_a_guest_that_sleeps_is_woken(self, client: RawClient, machine: FakeMachine) -> None:
        machine.state = "suspended"
        assert client.execute("query-status") == {"status": "suspended", "running": False}
        client.execute("system_wakeup")
        assert machine.calls == [("wake",)]

    def test_the_balloon(self, client: RawClient, machine: FakeMachine) -> None:
        targets: list[int] = []
        balloon = SimpleNamespace(actual=300 * MIB, stats=None, set_target=targets.append)
        machine.balloon = balloon
        assert client.execute("query-balloon") == {"actual": 300 * MIB}
        client.execute("balloon", value=200 * MIB)
        assert targets == [200 * MIB]
        stats = {"path": "/machine/peripheral/balloon0", "property": "guest-stats"}
        assert client.refusal("qom-get", **stats) == (
            "GenericError",
            "the guest has told nothing (yet): --balloon stats=2 asks it every 2 s",
        )
        balloon.stats = SimpleNamespace(values={"free_memory": 7, "swap_in": 0}, time=12.5)
        assert client.execute("qom-get", **stats) == {
            "stats": {"stat-free-memory": 7, "stat-swap-in": 0},
            "last-update": 12,
        }
        assert client.refusal("qom-get", path="/machine", property="type") == (
            "GenericError",
            "there is no 'type' of '/machine': give guest-stats of /machine/peripheral/balloon0",
        )

    @pytest.mark.parametrize(
        ("command", "arguments"),
        [
            ("query-balloon", {}),
            ("balloon", {"value": 1}),
            ("qom-get", {"path": "/machine/peripheral/balloon0", "property": "guest-stats"}),
        ],
    )
    def test_no_balloon(
        self, client: RawClient, command: str, arguments: dict[str, object]
    ) -> None:
        assert client.refusal(command, **arguments) == (
            "DeviceNotActive",
            "this machine has no balloon: start it with --balloon",
        )

    def test_simple_ones_reach_the_machine(self, client: RawClient, machine: FakeMachine) -> None:
        client.execute("system_powerdown")
        client.execute("block_resize", device="vda", size=32 * MIB)
        client.execute("block_resize", node_name="0:3", size=48 * MIB)
        client.execute("block_set_io_throttle", device="vda", iops=10, bps=0, iops_rd=0)
        client.execute("set_link", name="net1", up=False)
        client.execute("blockdev-change-medium", id="cd0", filename="x.iso")
        client.execute("eject", device="cd0", force=True)
        assert machine.calls == [
            ("press_power_button",),
            ("resize_disk", "vda", 32 * MIB),
            ("resize_disk", "0:3", 48 * MIB),
            ("limit_disk", "vda", ("iops", 10), ("bps", 0)),
            ("set_link", 1, False),
            ("change_medium", "cd0", "x.iso", ("force", False)),
            ("change_medium", "cd0", None, ("force", True)),
        ]

    @pytest.mark.parametrize(
        ("command", "arguments", "sentence"),
        [
            ("block_resize", {"size": 1}, "there is no disk '' (there: vda, 0:3)"),
            ("block_resize", {"device": "x", "size": 1}, "there is no disk 'x' (there: vda, 0:3)"),
            ("device_del", {"id": "x"}, "there is no disk 'x' (there: vda, 0:3)"),
            (
                "set_link",
                {"name": "x", "up": True},
                "there is no network interface 'x' (there: net0, net1)",
            ),
            ("eject", {"id": "x"}, "there is no CD drive 'x' (there: cd0)"),
            (
                "device_add",
                {"driver": "scsi-hd", "drive": "x"},
                "there is no node 'x' (there: none)",
            ),
        ],
    )
    def test_devices_that_are_not_there(
        self, client: RawClient, command: str, arguments: dict[str, object], sentence: str
    ) -> None:
        assert client.refusal(command, **arguments) == ("DeviceNotFound", sentence)

    @pytest.mark.parametrize(
        ("command", "arguments", "sentence"),
        [
            (
                "device_del",
                {"id": "vda"},
                "vda cannot be unplugged while the guest runs: only SCSI disks and ports can",
            ),
            (
                "block_set_io_throttle",
                {"device": "vda", "iops": 0, "bps": 0, "bps_rd": 1},
                "there are no limits for reads or writes alone: give bps and iops",
            ),
            (
                "device_add",
                {"driver": "usb-host"},
                "there is no driver 'usb-host' that can be plugged: give scsi-hd, virtserialport "
                "or virtconsole",
            ),
            (
                "device_add",
                {"driver": "scsi-hd", "id": "vda", "path": "x"},
                "there is a device vda already: give another id",
            ),
            (
                "device_add",
                {"driver": "scsi-hd", "bus": "ahci.0", "path": "x"},
                "there is no bus 'ahci.0': leave it out, or give scsi0.0",
            ),
            (
                "device_add",
                {"driver": "scsi-hd"},
                "device_add: a disk needs either path=PATH or nbd=URI",
            ),
            (
                "device_add",
                {"driver": "scsi-hd", "path": "x", "lun": -1},
                "device_add: lun=-1 is out of range: give a whole number from 0 to 16383",
            ),
            (
                "device_add",
                {"driver": "virtserialport", "id": "agent"},
                "there is a device agent already: give another id",
            ),
            (
                "device_add",
                {"driver": "virtserialport", "id": "x", "unix": "a", "file": "b"},
                "device_add: port x is connected to both unix and file: give one of them",
            ),
            (
                "chardev-add",
                {"id": "x", "backend": {"type": "socket", "data": {}}},
                "the backend of chardev-add is a Unix socket or a file that gets output: "
                'backend={"type": "socket", "data": {"addr": {"type": "unix", "data": '
                '{"path": PATH}}, "server": true, "wait": false}}',
            ),
            (
                "chardev-remove",
                {"id": "x"},
                "there is no chardev 'x' of chardev-add",
            ),
            ("system_wakeup", {}, "the guest does not sleep: there is nothing to wake"),
            ("blockdev-del", {"node-name": "x"}, "there is no node 'x' of blockdev-add"),
            (
                "blockdev-add",
                {"driver": "file", "node-name": "n", "filename": "/no/such"},
                "the disk image /no/such does not exist (truncate -s 10G makes an empty one)",
            ),
            (
                "blockdev-add",
                {"driver": "raw", "node-name": "n", "file": "other"},
                "the image is given as driver=file and filename=PATH, or as driver=FORMAT and "
                'file={"driver": "file", "filename": PATH}',
            ),
            (
                "blockdev-add",
                {"driver": "file", "node-name": "n", "filename": "x", "locking": "on"},
                "blockdev-add knows no member 'locking' of an image",
            ),
            (
                "blockdev-add",
                {"driver": "file", "node-name": "n", "filename": "x", "cache": {"no-flush": True}},
                "a cache of blockdev-add has direct=true or false, and nothing else",
            ),
            (
                "blockdev-add",
                {"driver": "file", "node-name": "n", "filename": "x", "discard": "ignore"},
                "discards of the guest always reach the image: leave discard out",
            ),
        ],
    )
    def test_what_cannot_be(
        self, client: RawClient, command: str, arguments: dict[str, object], sentence: str
    ) -> None:
        assert client.refusal(command, **arguments) == ("GenericError", sentence)

    def test_an_error_of_the_machine_is_told(self, client: RawClient, machine: FakeMachine) -> None:
        def refuse(*arguments: object) -> None:
            raise UsageError("it cannot shrink")

        machine.resize_disk = refuse  # type: ignore[method-assign]
        answer = client.refusal("block_resize", device="vda", size=512)
        assert answer == ("GenericError", "it cannot shrink")

    def test_query_block(self, client: RawClient, machine: FakeMachine) -> None:
        disk, scsi, cdrom = client.execute("query-block")
        assert (disk["device"], disk["removable"]) == ("vda", False)
        assert (disk["inserted"]["iops"], disk["inserted"]["bps"]) == (500, 0)
        assert disk["inserted"]["image"] == {
            "filename": "a.img",
            "format": "raw",
            "virtual-size": 16 * MIB,
        }
        inserted = scsi["inserted"]
        assert (inserted["drv"], inserted["ro"]) == ("qcow2", True)
        assert inserted["cache"] == {"writeback": False, "direct": True, "no-flush": False}
        assert (cdrom["device"], cdrom["removable"], cdrom["tray_open"]) == ("cd0", True, True)
        assert "inserted" not in cdrom
        machine.cdroms["cd0"].path, machine.cdroms["cd0"].size = "x.iso", 4096
        medium = client.execute("query-block")[2]["inserted"]
        assert (medium["file"], medium["image"]["virtual-size"]) == ("x.iso", 4096)

    def test_query_chardev(self, client: RawClient) -> None:
        assert client.execute("query-chardev") == [
            {"label": "serial0", "filename": "pty:/dev/pts/7", "frontend-open": True},
            {"label": "console0", "filename": "unix:/c", "frontend-open": True},
            {"label": "agent", "filename": "unix:/a", "frontend-open": False},
        ]

    def test_query_cpus(self, client: RawClient) -> None:
        cpus = client.execute("query-cpus-fast")
        assert [(cpu["cpu-index"], cpu["thread-id"]) for cpu in cpus] == [(0, 101), (1, 102)]
        assert {cpu["target"] for cpu in cpus} == {"x86_64"}


class TestPlugging:
    def test_a_disk_of_its_own_settings(self, client: RawClient, machine: FakeMachine) -> None:
        client.execute("device_add", driver="scsi-hd", id="data", path="d.img", serial="S1")
        assert machine.calls == [("add", {"path": "d.img", "serial": "S1"})]
        plugged = client.execute("query-block")[2]
        assert (plugged["device"], plugged["qdev"]) == ("0:8", "data")
        again = client.refusal("device_add", driver="scsi-hd", id="data", path="e.img")
        assert again == ("GenericError", "there is a device data already: give another id")
        client.execute("block_resize", device="data", size=MIB)
        assert machine.calls[-1] == ("resize_disk", "0:8", MIB)
        client.execute("device_del", id="data")
        event = client.event("DEVICE_DELETED")
        assert event["data"] == {"device": "data", "path": "/machine/peripheral/data"}
        assert client.refusal("device_del", id="data")[0] == "DeviceNotFound"
        client.execute("device_add", driver="scsi-hd", id="data", path="d.img")

    def test_a_disk_on_a_node(
        self, client: RawClient, machine: FakeMachine, tmp_path: Path
    ) -> None:
        image = tmp_path / "d.img"
        image.write_bytes(bytes(MIB))
        file = {"driver": "file", "filename": str(image)}
        settings: dict[str, Any] = {"read-only": True, "cache": {"direct": False}}
        client.execute("blockdev-add", driver="raw", node_name="n", file=file, **settings)
        same = client.refusal("blockdev-add", driver="raw", node_name="n", file=file)
        assert same == ("GenericError", "there is a node n already: give another node-name")
        client.execute("device_add", driver="scsi-hd", id="d", drive="n", scsi_id=2, lun=1)
        expected = {"path": str(image), "format": "raw", "readonly": True, "direct": False}
        assert machine.calls == [("add", {**expected, "target": 2, "lun": 1})]
        assert client.execute("query-block")[2]["inserted"]["node-name"] == "n"
        assert client.refusal("device_add", driver="scsi-hd", drive="n") == (
            "GenericError",
            "node n is in use by another device",
        )
        assert client.refusal("blockdev-del", node_name="n") == (
            "GenericError",
            "node n is in use: device_del the disk first",
        )
        client.execute("block_resize", node_name="n", size=2 * MIB)
        assert machine.calls[-1] == ("resize_disk", "2:1", 2 * MIB)
        client.execute("device_del", id="d")
        client.execute("blockdev-del", node_name="n")
        assert client.refusal("blockdev-del", node_name="n")[0] == "GenericError"

    def test_a_port_of_its_own_settings(self, client: RawClient, machine: FakeMachine) -> None:
        settings = {"name": "org.x", "unix": "/s"}
        client.execute("device_add", driver="virtserialport", id="p", **settings)
        assert machine.calls == [("add_port", "org.x", {"unix": "/s"})]
        assert client.execute("query-chardev")[-1] == {
            "label": "p",
            "filename": "pty",
            "frontend-open": True,
        }
        machine.tell("VSERPORT_CHANGE", id="org.x", open=True)
        assert client.event("VSERPORT_CHANGE")["data"] == {"id": "p", "open": True}
        client.execute("device_del", id="p")
        assert client.event("DEVICE_DELETED")["data"]["device"] == "p"
        client.execute("device_add", driver="virtconsole", name="org.x", pty=True)
        assert machine.calls[-1] == ("add_port", "org.x", {"pty": True, "console": True})
        client.execute("device_del", id="org.x")
        client.execute("device_del", id="agent")
        assert machine.ports == {}

    def test_a_port_on_a_character_device(self, client: RawClient, machine: FakeMachine) -> None:
        address = {"type": "unix", "data": {"path": "/s"}}
        listening = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
        connecting = {"type": "socket", "data": {"addr": address, "server": False}}
        file = {"type": "file", "data": {"out": "/f"}}
        for id, backend, expected in (
            ("a", listening, {"unix": "/s"}),
            ("b", connecting, {"connect": "/s"}),
            ("c", file, {"file": "/f"}),
        ):
            client.execute("chardev-add", id=id, backend=backend)
            same = client.refusal("chardev-add", id=id, backend=backend)
            assert same[1] == f"there is a chardev {id} already: give another id"
            client.execute("device_add", driver="virtserialport", id=f"port-{id}", chardev=id)
            assert machine.calls[-1] == ("add_port", f"port-{id}", expected)
            assert client.refusal("device_add", driver="virtserialport", id="y", chardev=id) == (
                "GenericError",
                f"chardev {id} is in use by another device",
            )
            assert client.refusal("chardev-remove", id=id) == (
                "GenericError",
                f"chardev {id} is in use: device_del the port first",
            )
            client.execute("device_del", id=f"port-{id}")
            client.execute("chardev-remove", id=id)
        assert client.refusal("device_add", driver="virtserialport", id="y", chardev="z") == (
            "DeviceNotFound",
            "there is no chardev 'z' (there: none)",
        )

    def test_one_that_was_there_from_the_start(self, client: RawClient) -> None:
        client.execute("device_del", id="0:3")
        assert client.event("DEVICE_DELETED")["data"]["device"] == "0:3"


class TestEvents:
    def test_they_reach_all_sessions(self, path: Path, machine: FakeMachine) -> None:
        with RawClient(path) as one, RawClient(path) as two:
            before = time.time()
            machine.tell("RESET", guest=True, reason="guest-reset")
            for client in (one, two):
                event = client.receive()
                assert event["event"] == "RESET"
                assert event["data"] == {"guest": True, "reason": "guest-reset"}
                stamp = event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6
                assert before - 0.001 <= stamp <= time.time()

    def test_none_comes_before_the_session_starts(self, path: Path, machine: FakeMachine) -> None:
        with RawClient(path, negotiate=False) as client:
            machine.tell("STOP")
            time.sleep(0.05)
            client.send(b'{"execute": "qmp_capabilities"}')
            assert client.receive() == {"return": {}}
            machine.tell("RESUME")
            message = client.receive()
            assert message["event"] == "RESUME"
            assert "data" not in message

    def test_those_of_a_command_come_before_its_answer(self, client: RawClient) -> None:
        for command, event in (("stop", "STOP"), ("cont", "RESUME")):
            client.send(json.dumps({"execute": command}).encode())
            assert client.receive()["event"] == event
            assert client.receive() == {"return": {}}

    def test_a_machine_that_ends_or_begins_anew_says_so_after_the_answer(
        self, client: RawClient
    ) -> None:
        for command, event in (("system_reset", "RESET"), ("quit", "SHUTDOWN")):
            client.send(json.dumps({"execute": command, "id": 1}).encode())
            assert client.receive() == {"return": {}, "id": 1}
            assert client.receive()["event"] == event


class TestManyAndSlow:
    def test_several_at_once(self, path: Path) -> None:
        clients = [RawClient(path) for _ in range(MAX_CLIENTS)]
        errors: list[object] = []

        def use(client: RawClient) -> None:
            for number in range(50):
                client.send(json.dumps({"execute": "query-status", "id": number}).encode())
            if [client.answer()["id"] for _ in range(50)] != list(range(50)):
                errors.append(client)

        threads = [threading.Thread(target=use, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(str(path))
            waiting.settimeout(0.2)
            with pytest.raises(TimeoutError):
                waiting.recv(1)  # one too many
            clients.pop().close()
            waiting.settimeout(20)
            assert waiting.recv(1000).startswith(b'{"QMP"')
        for client in clients:
            client.close()

    def test_who_does_not_read_answers_is_not_heard(
        self, path: Path, machine: FakeMachine, client: RawClient
    ) -> None:
        with RawClient(path) as slow:
            slow.socket.settimeout(0.5)
            request = json.dumps({"execute": "query-block"}).encode() * 100
            with pytest.raises(TimeoutError):
                while True:
                    slow.send(request)
            assert client.execute("query-status")["running"] is True
            slow.socket.settimeout(20)
            for _ in range(200):
                assert len(slow.answer()["return"]) == 3

    def test_who_does_not_read_events_is_dropped(
        self, path: Path, machine: FakeMachine, client: RawClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server_module, "_MOST_OUTPUT", 1 << 16)
        with RawClient(path) as slow:
            slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            received = 0
            for _ in range(200):
                for _ in range(100):
                    machine.tell("STOP", why="x" * 100)
                client.execute("query-status")
                received += len(client.events)
                client.events.clear()
            assert received > 19_000
            with pytest.raises((EOFError, ConnectionError, json.JSONDecodeError)):
                while True:
                    slow.receive()

    def test_events_of_a_flood_are_not_kept_without_end(
        self, path: Path, machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While the thread is busy with a command; who missed some is told by being dropped."""
        monkeypatch.setattr(server_module, "_MOST_EVENTS", 10)
        busy, go_on = threading.Event(), threading.Event()

        def press() -> None:
            busy.set()
            assert go_on.wait(20)

        machine.press_power_button = press  # type: ignore[method-assign]
        with RawClient(path) as client:
            client.send(b'{"execute": "system_powerdown"}')
            assert busy.wait(20)
            for _ in range(50):
                machine.tell("STOP")
            go_on.set()
            with pytest.raises((EOFError, ConnectionError)):
                for _ in range(20):
                    client.receive()
        with RawClient(path) as another:
            assert another.execute("query-status")["running"] is True

    def test_clients_that_vanish(self, path: Path, machine: FakeMachine) -> None:
        for data in (b"", b"{", b'{"execute": "query-block"}' * 1000):
            for _ in range(20):
                client = RawClient(path)
                client.send(data)
                client.close()
        machine.tell("STOP")
        with RawClient(path) as another:
            assert another.execute("query-status")["running"] is True


class TestSocket:
    def test_it_is_for_its_owner_alone(self, path: Path) -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_it_is_gone_after_the_end_and_last_words_arrive(
        self, tmp_path: Path, machine: FakeMachine
    ) -> None:
        path = tmp_path / "another"
        server = QmpServer(str(path), machine)  # type: ignore[arg-type]
        server.start()
        with RawClient(path) as client:
            machine.tell("SHUTDOWN", guest=True, reason="guest-shutdown")
            server.close()
            server.close()
            assert client.receive()["event"] == "SHUTDOWN"
            with pytest.raises(EOFError):
                client.receive()
        assert not path.exists()
        machine.tell("STOP")  # nobody listens any more

    def test_one_that_is_in_use_is_refused(self, path: Path, machine: FakeMachine) -> None:
        with pytest.raises(UsageError) as caught:
            QmpServer(str(path), machine)  # type: ignore[arg-type]
        assert str(caught.value) == (
            f"cannot listen on {path}: it exists and is in use; choose another path"
        )

    def test_one_that_was_left_behind_is_replaced(
        self, tmp_path: Path, machine: FakeMachine
    ) -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / "s"))
        server = QmpServer(str(tmp_path / "s"), machine)  # type: ignore[arg-type]
        server.start()
        with RawClient(tmp_path / "s") as client:
            assert client.execute("query-status")["running"] is True
        server.close()

    def test_closing_does_not_wait_for_a_client_that_does_not_read(
        self, tmp_path: Path, machine: FakeMachine
    ) -> None:
        server = QmpServer(str(tmp_path / "s"), machine)  # type: ignore[arg-type]
        server.start()
        with RawClient(tmp_path / "s") as client:
            client.socket.settimeout(0.2)
            with pytest.raises(TimeoutError):
                while True:
                    client.send(b'{"execute": "query-block"}' * 100)
            wait_until(lambda: any(each.output for each in server._clients.values()))
            started = time.monotonic()
            server.close()
            assert time.monotonic() - started < 5
