"""The control socket of a real machine, as clients of QMP use it, with a guest of a few lines."""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.qmp_client import RawClient

from pyvmm.errors import ExitStatus, UsageError
from pyvmm.guest.console import GuestConsole
from pyvmm.machine.vm import VM

PROMPT = b"> "
MIB = 1 << 20
Boot = Callable[..., tuple[VM, GuestConsole]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp.sock"


@pytest.fixture
def boot(boot_micro: Boot, monitor_guest: Path, path: Path) -> Boot:
    """The guest that obeys its serial port, with a control socket at `path`."""
    return partial(boot_micro, monitor_guest, qmp=f"unix:{path}")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.img" for name in "abc"]
    for image in paths:
        image.touch()
        os.truncate(image, 16 * MIB)
    return paths


def test_stop_and_cont(boot: Boot, path: Path) -> None:
    vm, console = boot()
    with RawClient(path) as client:
        client.execute("stop")
        assert client.execute("query-status") == {"status": "paused", "running": False}
        console.send(b"A")
        assert console.read(timeout=0.1) == b""
        client.execute("cont")
        console.expect(b"A", timeout=10)
        vm.pause()
        assert [client.event("STOP")["event"], client.event("RESUME")["event"]]
        client.event("STOP")


def test_reset_power_off_and_the_end_of_the_socket(boot: Boot, path: Path) -> None:
    vm, console = boot()
    with RawClient(path) as client:
        client.execute("system_reset")
        console.expect(PROMPT, timeout=10)
        assert client.event("RESET")["data"]["guest"] is False
        client.execute("system_powerdown")
        client.event("POWERDOWN")
        console.send(b"p")
        assert client.event("SHUTDOWN")["data"] == {"guest": True, "reason": "guest-shutdown"}
        assert client.execute("query-status")["status"] == "shutdown"
        vm.close()
        with pytest.raises(EOFError):
            client.receive()
    assert not path.exists()


def test_quit_ends_it_with_status_0(boot: Boot, path: Path) -> None:
    vm, _ = boot()
    with RawClient(path) as client:
        client.execute("stop")
        client.execute("quit")
        assert vm.wait(timeout=10).status == ExitStatus.OK
        vm.close()
        assert client.event("SHUTDOWN")["data"] == {"guest": False, "reason": "host-qmp-quit"}


def test_a_panic_is_told_of(boot: Boot, path: Path) -> None:
    vm, console = boot()
    with RawClient(path) as client:
        console.send(b"c")
        assert client.event("GUEST_PANICKED")["data"] == {"action": "poweroff"}
        assert client.execute("query-status")["status"] == "guest-panicked"
        assert client.event("SHUTDOWN")["data"]["reason"] == "guest-panic"
    assert vm.wait(timeout=10).status == ExitStatus.GUEST_PANIC


def test_disks(boot: Boot, path: Path, images: list[Path]) -> None:
    one, scsi, later = images
    vm, _ = boot(disks=[one, {"path": scsi, "bus": "scsi", "iops": 100}])
    with RawClient(path) as client:
        first, second = client.execute("query-block")
        assert (first["device"], first["inserted"]["file"]) == ("vda", str(one))
        assert (second["device"], second["inserted"]["iops"]) == ("0:0", 100)

        client.execute("block_resize", device="vda", size=24 * MIB)
        assert one.stat().st_size == 24 * MIB
        kind, sentence = client.refusal("block_resize", device="vda", size=8 * MIB)
        assert kind == "GenericError"
        assert "cannot shrink" in sentence
        client.execute("block_set_io_throttle", device="0:0", iops=0, bps=MIB)
        assert client.execute("query-block")[1]["inserted"]["bps"] == MIB

        file = {"driver": "file", "filename": str(later)}
        client.execute("blockdev-add", driver="raw", node_name="n", file=file)
        client.execute("device_add", driver="scsi-hd", id="d", drive="n", lun=5)
        assert vm.disks["0:5"][1].name == str(later)
        taken = client.refusal("device_add", driver="scsi-hd", path=str(later), lun=5)
        assert taken[1].startswith("there is something at target 0, LUN 5 already")
        client.execute("device_del", id="d")
        assert client.event("DEVICE_DELETED")["data"]["device"] == "d"
        assert "0:5" not in vm.disks
        client.execute("device_del", id="0:0")
        client.event("DEVICE_DELETED")


def test_no_scsi_controller_nothing_to_plug_into(
    boot: Boot, path: Path, images: list[Path]
) -> None:
    boot()
    with RawClient(path) as client:
        assert client.refusal("device_add", driver="scsi-hd", path=str(images[0])) == (
            "GenericError",
            "this machine has no SCSI controller: start it with scsi='queues=1' or a SCSI disk",
        )


def test_a_medium(boot: Boot, path: Path, images: list[Path]) -> None:
    boot(cdroms=["none"])
    with RawClient(path) as client:
        client.execute("blockdev-change-medium", device="cd0", filename=str(images[0]))
        (drive,) = client.execute("query-block")
        assert drive["inserted"]["image"]["virtual-size"] == 16 * MIB
        assert drive["locked"] is False
        client.execute("eject", device="cd0")
        assert "inserted" not in client.execute("query-block")[0]


def test_a_balloon(boot: Boot, path: Path) -> None:
    vm, _ = boot(memory="64M", balloon="stats=1")
    with RawClient(path) as client:
        assert client.execute("query-balloon") == {"actual": 64 * MIB}
        client.execute("balloon", value=48 * MIB)
        assert vm.balloon is not None
        assert vm.balloon.target == 48 * MIB
        kind, sentence = client.refusal("balloon", value=MIB)
        assert (kind, sentence) == (
            "GenericError",
            "balloon target 1048576 is too small: the least is 32M (for mebibytes write 1048576M)",
        )


def test_ports(boot: Boot, path: Path, tmp_path: Path) -> None:
    vm, _ = boot(ports=["first"])
    with RawClient(path) as client:
        socket = tmp_path / "port"
        client.execute("device_add", driver="virtserialport", id="p", name="x", unix=str(socket))
        assert set(vm.ports) == {"first", "x"}
        assert socket.is_socket()
        ports = client.execute("query-chardev")[-2:]
        assert [(port["label"], port["frontend-open"]) for port in ports] == [
            ("first", False),
            ("p", False),
        ]
        assert ports[1]["filename"] == f"unix:{socket}"
        client.execute("device_del", id="p")
        assert client.event("DEVICE_DELETED")["data"]["device"] == "p"
        assert not socket.exists()
        client.execute("device_del", id="first")
        assert vm.ports == {}
        awake = client.refusal("system_wakeup")
        assert awake == ("GenericError", "the guest does not sleep: there is nothing to wake")


def test_links_and_threads(boot: Boot, path: Path) -> None:
    vm, _ = boot(nets=["user"], cpus=2)
    with RawClient(path) as client:
        client.execute("set_link", name="net0", up=False)
        assert vm.nets[0].link_up is False
        threads = [cpu["thread-id"] for cpu in client.execute("query-cpus-fast")]
        assert len(set(threads)) == 2
        for thread in threads:
            assert Path(f"/proc/self/task/{thread}").exists()


def test_character_devices(boot: Boot, path: Path, monitor_guest: Path, tmp_path: Path) -> None:
    boot(console=f"unix:{tmp_path / 'hvc0'}")
    with RawClient(path) as client:
        serial, console = client.execute("query-chardev")
        assert (serial["label"], serial["filename"]) == ("serial0", "pipe")
        assert console["filename"] == f"unix:{tmp_path / 'hvc0'}"
    with VM(kernel=monitor_guest, memory="32M", serial="pty", qmp=f"unix:{path}2") as vm:
        vm.start()
        with RawClient(f"{path}2") as client:
            filename = client.execute("query-chardev")[0]["filename"]
            assert filename.startswith("pty:/dev/pts/")
            assert Path(filename.removeprefix("pty:")).is_char_device()


def test_a_socket_in_use_is_refused_before_anything_runs(
    boot: Boot, path: Path, monitor_guest: Path
) -> None:
    boot()
    with VM(kernel=monitor_guest, memory="32M", serial="none", qmp=f"unix:{path}") as vm:
        with pytest.raises(UsageError) as caught:
            vm.start()
        assert vm.state == "prelaunch"
    assert str(caught.value) == (
        f"cannot listen on {path}: it exists and is in use; choose another path"
    )
    with RawClient(path) as client:  # that of the first is as it was
        assert client.execute("query-status")["running"] is True


def test_all_at_once_from_many_sides(boot: Boot, path: Path) -> None:
    """Clients that stop and go on, a guest that resets itself, and one who sends rubbish."""
    vm, _ = boot()
    failures: list[BaseException] = []

    def use(seed: int) -> None:
        rng = random.Random(seed)
        try:
            with RawClient(path) as client:
                for _ in range(40):
                    client.execute(rng.choice(("stop", "cont", "query-status", "query-block")))
        except BaseException as error:
            failures.append(error)

    def send_rubbish() -> None:
        rng = random.Random(7)
        try:
            for _ in range(40):
                with RawClient(path) as client:
                    client.send(b"x" + rng.randbytes(40) + b'\n"\n')
                    client.answer()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(3)]
    threads.append(threading.Thread(target=send_rubbish))
    for thread in threads:
        thread.start()
    for _ in range(5):
        vm.reset()
    for thread in threads:
        thread.join()
    assert failures == []
    vm.resume()
    vm.stop()


def test_the_qmp_package_drives_a_machine(boot: Boot, path: Path, images: list[Path]) -> None:
    """PyPI's qemu.qmp, which QEMU's own tools are made with."""
    qmp = pytest.importorskip("qemu.qmp", reason="qemu.qmp is not installed: run scripts/setup")
    vm, _ = boot(disks=[{"path": images[0], "bus": "scsi"}])

    async def drive() -> None:
        client = qmp.QMPClient("test")
        await client.connect(str(path))
        assert (await client.execute("query-status"))["running"] is True
        with client.listener(("STOP", "RESUME")) as events:
            await client.execute("stop")
            assert (await events.get())["event"] == "STOP"
            await client.execute("cont")
            assert (await events.get())["event"] == "RESUME"
        with pytest.raises(qmp.ExecuteError) as refused:
            await client.execute("set_link", {"name": "net0", "up": True})
        assert refused.value.error_class == "DeviceNotFound"
        both = client.execute("query-block"), client.execute("query-cpus-fast")
        disks, cpus = await asyncio.gather(*both)
        assert (disks[0]["device"], len(cpus)) == ("0:0", 1)
        with client.listener("SHUTDOWN") as events:
            await client.execute("quit")
            assert (await events.get())["data"]["reason"] == "host-qmp-quit"
        await client.disconnect()

    asyncio.run(drive())
    assert vm.wait(timeout=10).status == ExitStatus.OK


def test_qmp_shell(boot: Boot, path: Path) -> None:
    pytest.importorskip("qemu.qmp", reason="qemu.qmp is not installed: run scripts/setup")
    vm, _ = boot()
    shell = subprocess.run(
        [sys.executable, "-m", "qemu.qmp.qmp_shell", str(path)],
        input="query-status\nstop\nset_link name=net0 up=true\nquit\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Connected to QEMU" in shell.stdout
    assert '"running": true' in shell.stdout or "'running': True" in shell.stdout, shell.stdout
    assert "DeviceNotFound" in shell.stdout
    assert vm.wait(timeout=10).status == ExitStatus.OK


def test_pyvmm_ctl(boot: Boot, path: Path, images: list[Path]) -> None:
    vm, _ = boot(disks=[images[0]])
    command = [sys.executable, "-m", "pyvmm", "ctl", str(path)]

    def ctl(*words: str) -> Any:
        ran = subprocess.run([*command, *words], capture_output=True, text=True, timeout=60)
        assert (ran.returncode, ran.stderr) == (0, "")
        return json.loads(ran.stdout) if ran.stdout else None

    watcher = subprocess.Popen([*command, "events"], stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    while not select.select([watcher.stdout], [], [], 0)[0]:  # until it is connected
        ctl("stop")
        ctl("cont")
    assert ctl("block_resize", "device=vda", "size=20M") is None
    assert images[0].stat().st_size == 20 * MIB
    assert ctl("stop") is None
    assert ctl("query-status") == {"status": "paused", "running": False}
    assert ctl("quit") is None
    vm.wait(timeout=10)
    vm.close()
    lines = watcher.stdout.read().splitlines()
    assert watcher.wait(10) == 0
    watcher.stdout.close()
    assert lines[-1].endswith('SHUTDOWN {"guest": false, "reason": "host-qmp-quit"}')
    refused = subprocess.run([*command, "stop"], capture_output=True, text=True)
    assert refused.returncode == ExitStatus.USAGE
    assert refused.stderr == (
        f"pyvmm: error: there is no socket {path}: 'pyvmm run --qmp unix:{path}' makes it\n"
    )
