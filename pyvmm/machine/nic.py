"""The network devices of a machine, and what they are connected to."""

from __future__ import annotations

import os

from pyvmm.virtio.net import VirtioNet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import ExitStack

    from pyvmm.backends.net import NetPort
    from pyvmm.config import NetConfig, VmConfig

# Locally administered (IEEE 802, 8.2.2), and known for virtual machines.
_MAC_PREFIX = b"\x52\x54\x00"


def open_nics(config: VmConfig, stack: ExitStack) -> list[VirtioNet]:
    """The devices of `config.nets`; `stack` closes their ports. Raises UsageError."""
    nics = []
    for index, net in enumerate(config.nets):
        port = open_port(net)
        stack.callback(port.close)
        pcap_fd = -1
        if net.pcap is not None:
            from pyvmm.backends.pcap import create_pcap

            pcap_fd = create_pcap(net.pcap, f"net{index}")
            stack.callback(os.close, pcap_fd)
        nics.append(
            VirtioNet(port, mac=_mac_address(config, index), name=f"net{index}", pcap_fd=pcap_fd)
        )
    return nics


def _mac_address(config: VmConfig, index: int) -> bytes:
    """The address that was asked for, else one that the device has in each run of this machine.

    What tells a machine from all others is what it has alone: a tap, or a disk that it writes. A
    machine without either remembers nothing, and gets a new address each time.
    """
    net = config.nets[index]
    if net.mac is not None:
        return bytes.fromhex(net.mac.replace(":", ""))
    own = [os.path.realpath(disk.path) for disk in config.disks if disk.path and not disk.shares]
    if net.tap is not None:
        identity = f"tap {net.tap}"
    elif own:
        identity = f"disk {own[0]}"
    else:
        return _MAC_PREFIX + os.urandom(3)
    from zlib import crc32

    number = crc32(f"{_machine_id()} {identity} {index}".encode())
    return _MAC_PREFIX + number.to_bytes(4, "big")[1:]


def _machine_id() -> str:
    try:
        with open("/etc/machine-id") as file:
            return file.read().strip()
    except OSError:
        return ""


def open_port(config: NetConfig) -> NetPort:
    """The backend that `config` asks for. UsageError when it cannot be had."""
    match config.kind:
        case "user":
            from pyvmm.backends.forward import Forward
            from pyvmm.backends.user_net import DEFAULT_MTU, UserNet

            return UserNet(
                network=config.net,
                mtu=config.mtu or DEFAULT_MTU,
                hostname=config.hostname,
                restrict=config.restrict,
                loopback=config.loopback,
                ipv6=config.ipv6,
                forwards=[Forward.from_text(text) for text in config.hostfwd],
            )
        case "passt":
            from pyvmm.backends.forward import Forward
            from pyvmm.backends.passt import DEFAULT_MTU, Passt

            return Passt(
                mtu=config.mtu or DEFAULT_MTU,
                loopback=config.loopback,
                ipv6=config.ipv6,
                forwards=[Forward.from_text(text) for text in config.hostfwd],
            )
        case "switch":
            from pyvmm.backends.switch import SwitchPort

            assert config.switch is not None
            return SwitchPort(config.switch, mtu=config.mtu or 0, offloads=config.offloads)
        case "tap":
            from pyvmm.backends.tap import open_tap

            assert config.tap is not None
            return open_tap(
                config.tap,
                queues=config.queues,
                mtu=config.mtu,
                offloads=config.offloads,
                vhost=config.vhost,
            )
    raise AssertionError(f"a network of kind {config.kind!r}")
