"""The settings of a machine: defaults, what contradicts what, files, and kernel parameters."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.config import (
    BalloonConfig,
    ChardevConfig,
    DiskConfig,
    NetConfig,
    PortConfig,
    ScsiConfig,
    VmConfig,
    from_command_line,
    load_toml,
)
from pyvmm.errors import UsageError
from pyvmm.schema import MIB, Source


def config(**options: object) -> VmConfig:
    """As from the command line, with a kernel."""
    return from_command_line({"kernel": "bzImage", **options})


def error_of(**options: object) -> str:
    with pytest.raises(UsageError) as error:
        config(**options)
    return str(error.value)


def test_defaults() -> None:
    assert config() == VmConfig(
        kernel="bzImage",
        initrd=None,
        append="",
        boot="auto",
        memory=512 * MIB,
        cpus=1,
        accel="auto",
        hugepages=False,
        rng=True,
        disks=(),
        serial=ChardevConfig(kind="stdio"),
        console=ChardevConfig(kind="none"),
        reboot=True,
        timeout=None,
    )


def test_options_are_text_and_become_what_they_mean() -> None:
    read = config(
        memory="1G",
        cpus="4",
        timeout="1.5",
        serial="file:log",
        disks=["a.img", "path=b.img,readonly=on,direct=on,queues=2,serial=X,cache=writethrough"],
    )
    assert (read.memory, read.cpus, read.timeout) == (1024 * MIB, 4, 1.5)
    assert read.serial == ChardevConfig(kind="file", path="log")
    assert read.disks == (
        DiskConfig(path="a.img"),
        DiskConfig(
            path="b.img", readonly=True, direct=True, queues=2, serial="X", cache="writethrough"
        ),
    )


DISK_KEYS = (
    "(known keys: path, nbd, format, readonly, snapshot, direct, cache, on_error, iops, bps, "
    "queues, queue_size, serial, bus, target, lun)"
)
CHARDEVS = "give stdio, pty, file:PATH, unix:PATH, connect:PATH or none"
BALLOON_KEYS = "(known keys: size, stats, reporting, hinting, deflate_on_oom, auto)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "31M"}, "--memory=31M is too small: the least is 32M"),
        (
            {"memory": "512"},
            "--memory=512 is too small: the least is 32M (for mebibytes write 512M)",
        ),
        (
            {"memory": "512000000"},
            "--memory=512000000 is not a multiple of 1M: give 488M or 489M",
        ),
        (
            {"memory": "a lot"},
            "--memory=a lot is not a size: give a number with K, M, G or T, such as 512M",
        ),
        (
            {"memory": "513M", "hugepages": True},
            "--memory=513M is not a multiple of the huge page of 2M: "
            "give 512M or 514M, or no --hugepages",
        ),
        ({"cpus": "0"}, "--cpus=0 is out of range: give a whole number from 1 to 64"),
        ({"cpus": "65"}, "--cpus=65 is out of range: give a whole number from 1 to 64"),
        ({"boot": "uefi"}, "--boot=uefi is not one of the choices: give auto or bzimage"),
        ({"accel": "tcg"}, "--accel=tcg is not one of the choices: give auto, kvm or nested"),
        ({"timeout": "0"}, "--timeout=0 is out of range: give more than 0 seconds"),
        ({"kernel": ""}, "--kernel= is empty: give the path of a file"),
        (
            {"disks": ["a,readony=on"]},
            f"unknown key 'readony' in --disk, did you mean 'readonly'? {DISK_KEYS}",
        ),
        (
            {"disks": ["a,queues=17"]},
            "--disk: queues=17 is out of range: give a whole number from 1 to 16",
        ),
        (
            {"disks": ["a,serial=123456789012345678901"]},
            "--disk: serial=123456789012345678901 is too long: at most 20 characters",
        ),
        (
            {"disks": ["a.img", "./a.img,readonly=on"]},
            "--disk=./a.img is given twice: both must have readonly=on or snapshot=on "
            "for the guest to see it as two disks",
        ),
        (
            {"disks": ["a,bus=scsi,on_error=stop"]},
            "--disk: on_error=stop is for disks with bus=virtio",
        ),
        ({"disks": ["readonly=on"]}, "--disk: a disk needs either path=PATH or nbd=URI"),
        ({"disks": ["a,nbd=nbd://b"]}, "--disk: a disk needs either path=PATH or nbd=URI"),
        (
            {"disks": ["nbd=host:10809"]},
            "--disk: nbd=host:10809 is no URI of NBD: give nbd://HOST:PORT/EXPORT or "
            "nbd+unix:///EXPORT?socket=PATH (a comma in it is written twice)",
        ),
        (
            {"disks": ["nbd=nbd://a,format=raw"]},
            "--disk: format is for images and devices, not for nbd: that is the server's",
        ),
        (
            {"disks": ["nbd=nbd://a,direct=on"]},
            "--disk: direct is for images and devices, not for nbd: that is the server's",
        ),
        (
            {"disks": ["a,format=qcow3"]},
            "--disk: format=qcow3 is not one of the choices: give raw, qcow2, vmdk, vhdx, vpc, "
            "vdi, qed or parallels",
        ),
        (
            {"disks": ["nbd=nbd://a/b", "nbd=nbd://a/b"]},
            "--disk=nbd://a/b is given twice: both must have readonly=on or snapshot=on "
            "for the guest to see it as two disks",
        ),
        (
            {"disks": ["a.img,readonly=on,snapshot=on"]},
            "--disk: readonly=on and snapshot=on contradict each other: readonly=on if the guest "
            "must not write, snapshot=on if its writes are thrown away",
        ),
        (
            {"balloon": "481M"},
            "--balloon: size=481M leaves too little of the guest's 512M: give at most 480M",
        ),
        (
            {"balloon": "reporting"},
            "--balloon: size=reporting is not a size: give a number with K, M, G or T, such as "
            "512M",
        ),
        (
            {"balloon": "size=0,stats=3601"},
            "--balloon: stats=3601 is out of range: give a whole number from 0 to 3600",
        ),
        (
            {"balloon": "size=0,deflate-on-oom=yes"},
            "--balloon: deflate_on_oom=yes is neither on nor off",
        ),
        (
            {"balloon": "size=0,deflate-on-om=on"},
            "--balloon: 'deflate-on-om=on' is not KEY=VALUE (a comma inside a value is written "
            "twice)",
        ),
        (
            {"balloon": "size=0,report=on"},
            f"unknown key 'report' in --balloon, did you mean 'reporting'? {BALLOON_KEYS}",
        ),
        (
            {"balloon": "0", "hugepages": True},
            "--balloon and --hugepages contradict each other: huge pages are reserved for the "
            "guest and cannot be given back",
        ),
        (
            {"balloon": "0", "memory": "16T"},
            "--balloon is for less memory than 16T: give the guest less, or no --balloon",
        ),
        ({"serial": "pipe"}, f"--serial=pipe is for Python programs: {CHARDEVS}"),
        (
            {"qmp": "tcp:4444"},
            "--qmp=tcp:4444 is not the address of a Unix socket: give unix:PATH",
        ),
        ({"qmp": "unix:"}, "--qmp=unix: is empty: give the path of a file"),
        (
            {"qmp": "unix:vm.sock,server=on,wait=off"},
            "--qmp=unix:vm.sock,server=on,wait=off has options, which there are none of: "
            "give unix:PATH alone",
        ),
        ({"serial": "tty"}, f"--serial=tty is not a character device: {CHARDEVS}"),
        ({"serial": "file"}, "--serial: file needs a path: give file:PATH"),
        ({"console": "unix:"}, "--console: path= is empty: give the path of a file"),
        ({"serial": "pty:/dev/pts/1"}, "--serial: pty has no path: give pty alone"),
        (
            {"serial": "stdio", "console": "stdio"},
            "--serial and --console are both stdio: "
            "connect one of them to something else or to none",
        ),
        (
            {"serial": "file:/tmp/log", "console": "file:/tmp/log"},
            "--serial and --console are both file:/tmp/log: "
            "connect one of them to something else or to none",
        ),
        (
            {"ports": ["agent"]},
            "--port=agent is connected to nothing: "
            "give unix=PATH, connect=PATH, file=PATH, pty=on or stdio=on",
        ),
        (
            {"ports": ["agent,unix=/run/a,pty=on"]},
            "--port: port agent is connected to both unix and pty: give one of them",
        ),
        (
            {"ports": ["a,unix=/run/a", "a,unix=/run/b"]},
            "--port=a is given twice: give one of them another name",
        ),
        (
            {"ports": ["a/b,pty=on"]},
            "--port: name=a/b is no name of a file in the guest's /dev/virtio-ports: "
            "give one such as org.qemu.guest_agent.0",
        ),
        (
            {"ports": ["unix=/run/a"]},
            "--port: name is missing: give its name: /dev/virtio-ports/NAME in the guest",
        ),
        (
            {"ports": ["a,stdio=on"], "serial": "stdio"},
            "--serial and --port=a are both stdio: "
            "connect one of them to something else or to none",
        ),
        (
            {"ports": ["a,pty=on", "b,pty=on"], "max_ports": "1"},
            "--max-ports=1 is too small for the 2 ports that are given: give at least 2",
        ),
        (
            {"max_ports": "256"},
            "--max-ports=256 is out of range: give a whole number from 1 to 255",
        ),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    assert error_of(**options) == message


def test_balloon() -> None:
    read = config(balloon="100M,deflate-on-oom=on,reporting=on,auto=on").balloon
    assert read == BalloonConfig(
        size=100 * MIB, deflate_on_oom=True, reporting=True, auto=True, stats=2
    )
    assert read == BalloonConfig.from_text(read.to_text(), Source("--balloon"))
    assert BalloonConfig(auto=True, stats=5).stats == 5
    assert tomllib.loads(config(balloon="1M").to_toml())["balloon"] == (
        "size=1M,stats=0,reporting=off,hinting=off,deflate_on_oom=off,auto=off"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "mac=52:54:00:12:34:56",
            "--net is connected to nothing: give user, passt, switch=PATH or tap=NAME",
        ),
        ("tap", "--net: tap needs a value: give tap=NAME"),
        (
            "tap=a-name-of-16-char",
            "--net: tap=a-name-of-16-char is too long: at most 15 characters",
        ),
        (
            "tap=t0,mac=52:54:00:12:34",
            "--net: mac=52:54:00:12:34 is not a MAC address: give one such as 52:54:00:12:34:56",
        ),
        (
            "tap=t0,mac=53:54:00:12:34:56",
            "--net: mac=53:54:00:12:34:56 is a MAC address of no single device: "
            "give an even first byte",
        ),
        (
            "tap=t0,mtu=67",
            "--net: mtu=67 is out of range: give a whole number from 68 to 65521",
        ),
        (
            "tap=t0,vhost=on,pcap=x",
            "--net: pcap sees no frame that the host's kernel moves: leave vhost=on out",
        ),
        (
            "tap=t0,queues=17",
            "--net: queues=17 is out of range: give a whole number from 1 to 16",
        ),
        (
            "user,hostfwd=tcp:22",
            "--net: hostfwd=tcp:22 is not a forwarded port: "
            "give one such as tcp:127.0.0.1:2222-:22",
        ),
        ("user,vhost=on", "--net: vhost is for tap=NAME, not for user"),
        ("switch", "--net: switch needs a value: give switch=PATH"),
        ("switch=/s,hostfwd=tcp::1-:1", "--net: hostfwd is for user or passt, not for switch=PATH"),
        ("passt,net=10.0.3.0/24", "--net: net is for user, not for passt"),
        ("tap=t0,restrict=on", "--net: restrict is for user, not for tap=NAME"),
        (
            "user,net=10.0.2.0",
            "--net: net=10.0.2.0 is not an IPv4 network: give one such as 10.0.2.0/24",
        ),
        (
            "user,net=10.0.2.0/28",
            "--net: net=10.0.2.0/28 has too many or too few addresses: give one of 8 to 27 bits",
        ),
        (
            "user,net=10.0.2.1/24",
            "--net: net=10.0.2.1/24 is an address in a network: give the network's own, that ends "
            "in 0",
        ),
        (
            "user,mtu=500",
            "--net: mtu=500 is out of range for user: give one from 576 to 65520",
        ),
    ],
)
def test_bad_networks(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        NetConfig.from_text(text, Source("--net"))
    assert str(error.value) == message


def test_networks() -> None:
    config = NetConfig.from_text("tap=t0,queues=2,mac=52:54:00:AB:CD:EF", Source("--net"))
    assert config == NetConfig(kind="tap", tap="t0", queues=2, mac="52:54:00:ab:cd:ef")


def test_user_network() -> None:
    text = "user,hostfwd=tcp::2222-:22,net=192.168.7.0/24,hostfwd=udp:0.0.0.0:0-192.168.7.15:53"
    config = NetConfig.from_text(text, Source("--net"))
    assert config == NetConfig(
        kind="user",
        net="192.168.7.0/24",
        hostfwd=["tcp:127.0.0.1:2222-:22", "udp:0.0.0.0:0-192.168.7.15:53"],
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp",
        "tcp::22",
        "22-22",
        "::22-:22",
        "icmp::22-:22",
        "tcp::65536-:22",
        "tcp::-1-:22",
        "tcp::22-:0",
        "tcp::22-:",
        "tcp::²-:22",
        "tcp:localhost:22-:22",
        "tcp:1.2.3:22-:22",
        "tcp:1.2.3.256:22-:22",
        "tcp:[::1]:22-:22",
        "tcp::22-:22-:22",
        "tcp::22- :22",
        "tcp:1:2:3-:22",
    ],
)
def test_what_is_no_forwarded_port(text: str) -> None:
    with pytest.raises(UsageError) as error:
        NetConfig(kind="user", hostfwd=[text])
    assert str(error.value) == (
        f"hostfwd={text} is not a forwarded port: give one such as tcp:127.0.0.1:2222-:22"
    )


def test_no_kernel() -> None:
    with pytest.raises(UsageError) as error:
        from_command_line({})
    assert str(error.value) == (
        "--kernel is missing: give a Linux kernel (bzImage or vmlinux), "
        "or host for the newest in /boot"
    )


def test_least_memory_and_huge_pages_that_fit() -> None:
    assert config(memory="32M").memory == 32 * MIB
    assert config(memory="514M", hugepages=True).memory == 514 * MIB


def test_the_same_image_may_be_read_twice() -> None:
    assert len(config(disks=["a,readonly=on", "a,readonly=on"]).disks) == 2


@pytest.mark.parametrize(
    "text", ["stdio", "pty", "none", "pipe", "file:/a,b=c:d", "unix:/run/s", "connect:/s"]
)
def test_character_devices_round_trip(text: str) -> None:
    assert ChardevConfig.from_text(text, Source()).to_text() == text


@pytest.mark.parametrize("kind", ["pty", "pipe", "none"])
def test_two_of_a_kind_are_two_devices(kind: str) -> None:
    both = VmConfig(kernel="k", serial=ChardevConfig(kind=kind), console=ChardevConfig(kind=kind))
    assert both.serial.kind == both.console.kind == kind


def test_serial_leaves_stdio_to_the_console() -> None:
    read = config(console="stdio")
    assert read.serial == ChardevConfig(kind="none")
    assert read.console == ChardevConfig(kind="stdio")


@pytest.mark.parametrize(
    ("options", "command_line"),
    [
        ({}, "console=ttyS0"),
        ({"append": "quiet "}, "console=ttyS0 quiet"),
        ({"append": "console=tty0"}, "console=tty0"),
        ({"serial": "none"}, ""),
        ({"console": "stdio"}, "console=hvc0"),
        ({"console": "pty"}, "console=hvc0 console=ttyS0"),
        ({"serial": "pty", "console": "stdio"}, "console=ttyS0 console=hvc0"),
        ({"serial": "file:a", "console": "file:b"}, "console=ttyS0 console=hvc0"),
        ({"disks": ["a"]}, "console=ttyS0 root=/dev/vda rw"),
        ({"disks": ["a", "b"], "initrd": "i"}, "console=ttyS0 root=/dev/vda rw"),
        ({"disks": ["a,readonly=on"]}, "console=ttyS0 root=/dev/vda ro"),
        ({"disks": ["a"], "append": "root=/dev/vda1 ro"}, "console=ttyS0 root=/dev/vda1 ro"),
        ({"disks": ["a"], "append": "quiet ro"}, "console=ttyS0 root=/dev/vda rw quiet ro"),
        ({"disks": ["a,bus=scsi", "b"]}, "console=ttyS0 root=/dev/sda rw"),
        ({"disks": ["a", "b,bus=scsi"]}, "console=ttyS0 root=/dev/vda rw"),
        ({"disks": ["a,bus=scsi,lun=1", "b,bus=scsi"]}, "console=ttyS0"),
    ],
)
def test_command_line(options: dict[str, object], command_line: str) -> None:
    assert config(**options).command_line() == command_line


class TestScsi:
    def test_the_first_free_lun_by_default(self) -> None:
        disks = [
            "a,bus=scsi",
            "b,bus=scsi,lun=1",
            "c,bus=scsi",
            "d",
            "e,bus=scsi,target=3",
            "f,bus=scsi,target=3,lun=300",
            "g,bus=scsi,target=3",
        ]
        places = [(0, 0), (0, 1), (0, 2), (3, 0), (3, 300), (3, 1)]
        assert config(disks=disks).scsi_places() == places

    def test_a_controller_is_there_when_it_is_needed_or_asked_for(self) -> None:
        assert config(disks=["a"]).scsi is None
        assert config(disks=["a,bus=scsi"]).scsi == ScsiConfig()
        asked = config(scsi="queues=4,queue_size=64")
        assert asked.scsi == ScsiConfig(queues=4, queue_size=64)
        assert VmConfig(**tomllib.loads(asked.to_toml())).scsi == asked.scsi

    @pytest.mark.parametrize(
        ("disks", "message"),
        [
            (
                ["a,bus=scsi", "b,bus=scsi,lun=2", "c,bus=scsi,target=0,lun=2"],
                "--disk=c: there is something at target 0, LUN 2 already: "
                "give another lun, or none for the first that is free",
            ),
            (["a,lun=1"], "--disk: target and lun are places of SCSI disks: add bus=scsi"),
            (
                ["a,bus=scsi,queues=2"],
                "--disk: all SCSI disks share the queues of their controller: "
                "give --scsi queues=N,queue_size=N instead",
            ),
            (
                ["a,bus=scsi,lun=16384"],
                "--disk: lun=16384 is out of range: give a whole number from 0 to 16383",
            ),
            (
                ["a,bus=scsi,target=256"],
                "--disk: target=256 is out of range: give a whole number from 0 to 255",
            ),
            (["a,bus=ide"], "--disk: bus=ide is not one of the choices: give virtio or scsi"),
        ],
    )
    def test_errors(self, disks: list[str], message: str) -> None:
        assert error_of(disks=disks) == message


def test_options_replace_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "vm.toml"
    file.write_text('kernel = "vmlinuz"\nmemory = "1G"\ncpus = 2\ndisks = ["a.img", "b.img"]\n')
    assert from_command_line({}, str(file)) == VmConfig(
        kernel=f"{tmp_path}/vmlinuz",
        memory=1024 * MIB,
        cpus=2,
        disks=(DiskConfig(path=f"{tmp_path}/a.img"), DiskConfig(path=f"{tmp_path}/b.img")),
    )
    read = from_command_line({"kernel": "host", "disks": ["c.img"], "cpus": "1"}, str(file))
    assert (read.kernel, read.memory, read.cpus) == ("host", 1024 * MIB, 1)
    assert read.disks == (DiskConfig(path="c.img"),)


def test_tables_and_the_word_host_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "vm.toml"
    file.write_text(
        'kernel = "host"\nserial = "unix:sock"\nconsole = {kind = "file", path = "log"}\n'
        'timeout = 5\n[[disks]]\npath = "a.img"\nreadonly = true\n'
    )
    read = from_command_line({}, str(file))
    assert read.kernel == "host"
    assert read.serial == ChardevConfig(kind="unix", path=f"{tmp_path}/sock")
    assert read.console == ChardevConfig(kind="file", path=f"{tmp_path}/log")
    assert read.timeout == 5.0
    assert read.disks == (DiskConfig(path=f"{tmp_path}/a.img", readonly=True),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memory = 16", "{file}: memory=16 is too small: the least is 32M"),
        (
            "cpus = true",
            "{file}: cpus=True is not a whole number: give a whole number from 1 to 64",
        ),
        (
            '[[disks]]\npath = "a"\n[[disks]]\npath = "b"\nreadonly = "maybe"',
            "{file}: disks[1]: readonly=maybe is neither on nor off",
        ),
        ("kernel = 'k'\nkernel_ = 1", "unknown key 'kernel_' in {file}, did you mean 'kernel'? "),
        ("kernel = ", "{file} is not valid TOML: "),
        ("kernel = 'caf\\xe9'", "{file} is not valid TOML: "),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "vm.toml"
    file.write_bytes(text.encode().replace(b"\\xe9", b"\xe9"))
    with pytest.raises(UsageError) as error:
        load_toml(str(file))
    assert str(error.value).startswith(message.format(file=file))


def test_missing_file(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.toml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UsageError) as error:
            load_toml(str(path))
        assert str(error.value).startswith(f"{path} cannot be read: {reason}")


paths = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1).map(
    "/p".__add__
)
chardevs = st.one_of(
    st.sampled_from(["pty", "none"]).map(lambda kind: ChardevConfig(kind=kind)),
    st.builds(ChardevConfig, kind=st.sampled_from(["file", "unix"]), path=paths),
)
configs = st.builds(
    VmConfig,
    kernel=st.one_of(st.just("host"), paths),
    initrd=st.one_of(st.none(), paths),
    append=st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    boot=st.sampled_from(["auto", "bzimage"]),
    memory=st.integers(16, 1 << 20).map(lambda n: n * 2 * MIB),
    cpus=st.integers(1, 64),
    accel=st.sampled_from(["auto", "kvm", "nested"]),
    hugepages=st.booleans(),
    rng=st.booleans(),
    disks=st.lists(
        st.builds(
            DiskConfig,
            path=paths,
            readonly=st.booleans(),
            direct=st.booleans(),
            cache=st.sampled_from(["writeback", "writethrough"]),
            queues=st.integers(1, 16),
            queue_size=st.sampled_from([4, 256, 1024]),
            serial=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
        ),
        max_size=3,
        unique_by=lambda disk: disk.path,
    ),
    ports=st.lists(
        st.builds(PortConfig, name=st.sampled_from(["a", "b", "c.d"]), unix=paths),
        max_size=3,
        unique_by=lambda port: port.name,
    ),
    nets=st.lists(
        st.one_of(
            st.builds(
                NetConfig,
                tap=st.just("tap0"),
                vhost=st.booleans(),
                queues=st.integers(1, 16),
                mac=st.one_of(st.none(), st.just("52:54:00:00:00:01")),
                mtu=st.one_of(st.none(), st.integers(68, 65521)),
                offloads=st.booleans(),
            ),
            st.builds(NetConfig, kind=st.just("user"), pcap=st.one_of(st.none(), paths)),
        ),
        max_size=3,
    ),
    serial=chardevs,
    console=st.just(ChardevConfig(kind="stdio")),
    qmp=st.one_of(st.none(), paths.map(lambda path: f"unix:{path}")),
    reboot=st.booleans(),
    timeout=st.one_of(st.none(), st.floats(0.001, 1e6)),
)


@given(configs)
def test_every_configuration_round_trips_through_toml(original: VmConfig) -> None:
    table = tomllib.loads(original.to_toml())
    assert VmConfig.from_table(table, Source("vm.toml")) == original


class TestScsiUnits:
    def test_cdroms_and_devices(self) -> None:
        read = config(
            disks=["a", "b,bus=scsi"],
            cdroms=["x.iso", "none,name=spare,lun=7"],
            scsi_devices=["iscsi://u%p@h/iqn.a/1", "/dev/sdb,target=2"],
        )
        assert read.scsi is not None
        assert read.scsi_places() == [(0, 0), (0, 1), (0, 7), (0, 2), (2, 0)]
        assert read.cdrom_names() == ["cd0", "spare"]
        assert read.cdroms[1].path == "none"
        assert read.scsi_devices[0].path == "iscsi://u%p@h/iqn.a/1"

    def test_toml(self, tmp_path: Path) -> None:
        read = config(cdroms=["x.iso", "none"], scsi_devices=["iscsi://h/iqn.a/1", "/dev/sg0"])
        path = tmp_path / "vm.toml"
        path.write_text(read.to_toml())
        again = VmConfig.from_table(load_toml(str(path)), Source())
        assert again.cdroms[0].path == str(Path("x.iso").absolute())
        assert again.cdroms[1].path == "none"
        assert again.scsi_devices == read.scsi_devices

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"cdroms": ["a,lun=3"], "scsi_devices": ["/dev/sda,lun=3"]},
                "--scsi-device=/dev/sda: there is something at target 0, LUN 3 already: "
                "give another lun, or none for the first that is free",
            ),
            (
                {"cdroms": ["a,name=cd1", "b"]},
                "--cdrom=b: there is a drive called cd1 already: give another name",
            ),
        ],
    )
    def test_errors(self, options: dict[str, object], message: str) -> None:
        assert error_of(**options) == message

    def test_a_cdrom_is_not_the_root(self) -> None:
        assert "root=" not in config(cdroms=["a.iso"]).command_line()
        assert "root=/dev/sda" in config(cdroms=["a,lun=0"], disks=["b,bus=scsi"]).command_line()
        first = {"scsi_devices": ["/dev/sdb,lun=0"], "disks": ["b,bus=scsi"]}
        assert "root=" not in config(**first).command_line()
