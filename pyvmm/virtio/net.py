"""virtio-net: the network device (virtio 1.2, section 5.1).

What is rare is here: features, configuration space, control queue, life cycle. Frames are moved in
C, each pair of queues by a thread that sits in ``virtio_net_pair_run``, or by the host's kernel
(``vhost.py``).
"""

from __future__ import annotations

import os
import select
import struct
import threading

from pyvmm._core import ffi, lib
from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio.device import Activation, PythonDevice, VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from pyvmm.virtio.device import QueueActivation
    from pyvmm.virtio.queue import Chain, Virtqueue

    class Port(Protocol):
        """What the device asks of its backend; `backends.net.NetPort` has it."""

        fds: tuple[int, ...]
        framing: int
        engine: Any
        vnet_hdr: bool
        takes: int
        gives: int
        mtu: int
        vhost_fds: tuple[int, ...]
        remarks: list[str]

        def set_offloads(self, offloads: int) -> None: ...
        def set_queue_pairs(self, count: int) -> None: ...
        def set_link(self, up: bool) -> None: ...

    class Pair(Protocol):
        """A pair of queues and who serves it."""

        def start(self) -> None: ...
        def stop(self) -> None: ...
        def close(self) -> None: ...


# Of virtio 1.3 (5.1.3); Linux has them since 6.2.
VIRTIO_NET_F_GUEST_USO4 = 54
VIRTIO_NET_F_GUEST_USO6 = 55
VIRTIO_NET_F_HOST_USO = 56

_CSUM = lib.NET_OFFLOAD_CSUM
# Features (bits) by the offloads of the port that they need: of frames from the driver, to it.
_TX_FEATURES = {
    1 << uapi.VIRTIO_NET_F_CSUM: _CSUM,
    1 << uapi.VIRTIO_NET_F_HOST_TSO4: lib.NET_OFFLOAD_TSO4,
    1 << uapi.VIRTIO_NET_F_HOST_TSO6: lib.NET_OFFLOAD_TSO6,
    1 << uapi.VIRTIO_NET_F_HOST_ECN: lib.NET_OFFLOAD_ECN,
    1 << uapi.VIRTIO_NET_F_HOST_UFO: lib.NET_OFFLOAD_UFO,
    1 << VIRTIO_NET_F_HOST_USO: lib.NET_OFFLOAD_USO4 | lib.NET_OFFLOAD_USO6,
}
_RX_FEATURES = {
    1 << uapi.VIRTIO_NET_F_GUEST_CSUM: _CSUM,
    1 << uapi.VIRTIO_NET_F_GUEST_TSO4: lib.NET_OFFLOAD_TSO4,
    1 << uapi.VIRTIO_NET_F_GUEST_TSO6: lib.NET_OFFLOAD_TSO6,
    1 << uapi.VIRTIO_NET_F_GUEST_ECN: lib.NET_OFFLOAD_ECN,
    1 << uapi.VIRTIO_NET_F_GUEST_UFO: lib.NET_OFFLOAD_UFO,
    1 << VIRTIO_NET_F_GUEST_USO4: lib.NET_OFFLOAD_USO4,
    1 << VIRTIO_NET_F_GUEST_USO6: lib.NET_OFFLOAD_USO6,
}

_CTRL_VQ = 1 << uapi.VIRTIO_NET_F_CTRL_VQ
_CTRL_RX = 1 << uapi.VIRTIO_NET_F_CTRL_RX
_CTRL_RX_EXTRA = 1 << uapi.VIRTIO_NET_F_CTRL_RX_EXTRA
_CTRL_VLAN = 1 << uapi.VIRTIO_NET_F_CTRL_VLAN
_CTRL_MAC_ADDR = 1 << uapi.VIRTIO_NET_F_CTRL_MAC_ADDR
_CTRL_GUEST_OFFLOADS = 1 << uapi.VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
_ANNOUNCE = 1 << uapi.VIRTIO_NET_F_GUEST_ANNOUNCE
_MQ = 1 << uapi.VIRTIO_NET_F_MQ
_MRG_RXBUF = 1 << uapi.VIRTIO_NET_F_MRG_RXBUF
_MTU = 1 << uapi.VIRTIO_NET_F_MTU

_ALWAYS = (
    1 << uapi.VIRTIO_NET_F_MAC
    | 1 << uapi.VIRTIO_NET_F_STATUS
    | _MRG_RXBUF
    | _CTRL_VQ
    | _CTRL_MAC_ADDR
    | _ANNOUNCE
)
# What our own threads do, and the kernel's do not.
_FILTERS = _CTRL_RX | _CTRL_RX_EXTRA | _CTRL_VLAN

# The configuration space up to the MTU (5.1.4).
_CONFIG = struct.Struct("<6sHHH")

# A control command may bring this much: a table of MAC addresses is the longest.
_LONGEST_COMMAND = 1 << 16


class VirtioNet(VirtioDevice):
    """A network interface on `port`, which must stay open as long as the device lives.

    `mac` is its address (6 bytes), `name` what messages call it, `pcap_fd` where its frames are
    recorded (`backends.pcap.create_pcap`), or -1. It has a pair of queues for each descriptor of
    the port, or one for its engine, of `queue_size` descriptors each.
    """

    device_id = uapi.VIRTIO_ID_NET

    def __init__(
        self,
        port: Port,
        *,
        mac: bytes,
        name: str = "net",
        pcap_fd: int = -1,
        queue_size: int = 256,
    ) -> None:
        super().__init__()
        self.port = port
        self.name = name
        self.permanent_mac = mac
        self._fds = port.fds or (-1,)  # an engine has none
        self.max_pairs = len(self._fds)
        self.queue_sizes = (queue_size,) * (2 * self.max_pairs + 1)
        self.features = _features(port)
        self.link_up = True
        self._mac = mac
        self._announce = False
        self._features = 0  # negotiated
        self._irq: Any = None
        self._device = ffi.new(
            "struct virtio_net_device *",
            {
                "framing": port.framing,
                "engine": port.engine or ffi.NULL,
                "vnet_hdr": port.vnet_hdr,
                "link_up": True,
                "pcap_fd": pcap_fd,
            },
        )
        streams = port.framing == lib.NET_FRAMING_STREAM
        self._streams = [
            ffi.new("struct virtio_net_stream *") if streams else ffi.NULL for _ in self._fds
        ]
        self._filter = ffi.addressof(self._device, "filter")
        lib.net_filter_init(self._filter, mac, False)
        self._control = _Control(self)
        self._control.attach(self.config_changed, self.needs_reset)
        self._lock = threading.RLock()  # for what follows
        self._pairs: list[Pair | None] = []
        self._active = 1
        self._paused = False

    def read_config(self) -> bytes:
        """``struct virtio_net_config`` (5.1.4), up to its MTU."""
        status = self.link_up * uapi.VIRTIO_NET_S_LINK_UP
        status |= self._announce * uapi.VIRTIO_NET_S_ANNOUNCE
        return _CONFIG.pack(self._mac, status, self.max_pairs, self.port.mtu)

    def activate(self, activation: Activation) -> None:
        """Creates the pairs and starts the first. OSError when one cannot be created."""
        features = self._features = activation.features
        self._irq = activation.irq
        self._control.error_fds = []
        device = self._device
        device.mergeable = bool(features & _MRG_RXBUF)
        device.tx_offloads = _offloads(features, _TX_FEATURES)
        lib.net_filter_init(self._filter, self._mac, bool(features & _CTRL_VLAN))
        self._set_rx_offloads(_offloads(features, _RX_FEATURES))
        count = self.max_pairs if features & _MQ else 1
        control = activation.queues[2 * count]
        with self._lock:
            for index in range(count):
                rx, tx = activation.queues[2 * index : 2 * index + 2]
                pair = self._create_pair(activation, index, rx, tx) if rx and tx else None
                self._pairs.append(pair)
            if self.port.vhost_fds:
                lib.virtio_irq_hold(activation.irq, lib.VIRTIO_IRQ_VRING)
            self._start()
        queues = (control,) if control and features & _CTRL_VQ else ()
        self._control.activate(Activation(activation.memory, features, queues, activation.irq))

    def deactivate(self) -> None:
        """Stops serving and frees the queues."""
        self._control.deactivate()  # its thread takes the lock
        with self._lock:
            self._stop()
            for pair in self._pairs:
                if pair is not None:
                    pair.close()
            if self._pairs and self.port.vhost_fds:
                lib.virtio_irq_hold(self._irq, 0)
            self._pairs = []
            self._active = 1
            self._announce = False
            self._mac = self.permanent_mac

    def pause(self) -> None:
        """Stops moving frames; until `resume` guest memory is not touched. Idempotent."""
        with self._lock:
            self._paused = True
            self._stop()

    def resume(self) -> None:
        """Moves frames again after `pause`."""
        with self._lock:
            self._paused = False
            self._start()

    def set_link(self, up: bool) -> None:
        """Plugs the cable in or pulls it: without it no frame passes. Any thread.

        A driver that can do so announces itself to the network when the link is back.
        """
        self.port.set_link(up)
        self._set_link(up)

    def _set_link(self, up: bool) -> None:
        self.link_up = up
        self._announce = bool(up and self._features & _ANNOUNCE)
        lib.virtio_net_set_link(self._device, up)
        self.config_changed()

    @property
    def counters(self) -> dict[str, int]:
        """Since activation, all pairs together: see ``struct virtio_net_counters``.

        Empty where the kernel moves the frames.
        """
        totals: dict[str, int] = {}
        with self._lock:
            for pair in self._pairs:
                if isinstance(pair, _ThreadPair):
                    for name, count in pair.counters.items():
                        totals[name] = totals.get(name, 0) + count
        return totals

    def _create_pair(
        self, activation: Activation, index: int, rx: QueueActivation, tx: QueueActivation
    ) -> Pair:
        fd = self._fds[index]
        if self.port.vhost_fds:
            from pyvmm.virtio.vhost import VhostPair

            pair = VhostPair(self.port.vhost_fds[index], fd, activation, (rx, tx))
            self._control.error_fds.append(pair.error_fd)
            return pair
        native = lib.virtio_net_pair_create(
            self._device,
            fd,
            self._streams[index],
            activation.memory,
            rx.config,
            rx.kick,
            tx.config,
            tx.kick,
            activation.irq,
        )
        if native == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        return _ThreadPair(self, native, f"{self.name}.{index}")

    def _start(self) -> None:
        if not self._pairs:
            return
        self.port.set_queue_pairs(self._active)
        if not self._paused:
            for pair in self._pairs[: self._active]:
                if pair is not None:
                    pair.start()

    def _stop(self, first: int = 0) -> None:
        for pair in self._pairs[first:]:
            if pair is not None:
                pair.stop()

    def _set_rx_offloads(self, offloads: int) -> None:
        self.port.set_offloads(offloads)
        lib.virtio_net_set_rx_offloads(self._device, offloads)

    def _peer_gone(self) -> None:
        if self.link_up:
            _log().error("%s: what it was connected to has gone; its link is down", self.name)
            self._set_link(False)

    # Commands of the control queue (5.1.6.5). False is VIRTIO_NET_ERR, as is a wrong length.

    def execute(self, command: tuple[int, int], data: bytes) -> bool:
        """Obeys a command of the driver; whether it was a proper one. On the control thread."""
        feature, layout, method = _COMMANDS.get(command, _NO_COMMAND)
        if not self._features & feature:
            return False
        if layout is None:
            return bool(method(self, command[1], data))
        if len(data) != struct.calcsize(layout):
            return False
        return bool(method(self, command[1], *struct.unpack(layout, data)))

    def _set_rx_mode(self, mode: int, on: int) -> bool:
        bit = 1 << mode  # the commands are numbered as NET_FILTER_... are
        modes = self._filter.mode
        lib.net_filter_set_mode(self._filter, modes | bit if on else modes & ~bit)
        return True

    def _set_mac_table(self, _: int, data: bytes) -> bool:
        tables = []
        for _ in range(2):
            if len(data) < 4:
                return False
            count = int.from_bytes(data[:4], "little")
            macs, data = data[4 : 4 + 6 * count], data[4 + 6 * count :]
            if len(macs) != 6 * count:
                return False
            tables.append((macs, count))
        if data:
            return False
        for name, (macs, count) in zip(("unicast", "multicast"), tables, strict=True):
            lib.net_filter_set_table(ffi.addressof(self._filter, name), macs, count)
        return True

    def _set_mac(self, _: int, mac: bytes) -> bool:
        self._mac = mac
        lib.net_filter_set_mac(self._filter, mac)
        return True

    def _set_vlan(self, command: int, vlan: int) -> bool:
        if vlan >= lib.NET_FILTER_VLANS:
            return False
        lib.net_filter_set_vlan(self._filter, vlan, command == uapi.VIRTIO_NET_CTRL_VLAN_ADD)
        return True

    def _acknowledge_announcement(self, _: int) -> bool:
        self._announce = False
        self.config_changed()
        return True

    def _set_queue_pairs(self, _: int, count: int) -> bool:
        if not 1 <= count <= self.max_pairs:
            return False
        with self._lock:
            self._stop(count)
            self._active = count
            self._start()
        return True

    def _set_guest_offloads(self, _: int, features: int) -> bool:
        if features & ~(self._features & sum(_RX_FEATURES)):
            return False
        self._set_rx_offloads(_offloads(features, _RX_FEATURES))
        return True


# By class and command: the feature it belongs to, the layout of its data (None: it looks itself).
_RX, _MAC, _VLAN = uapi.VIRTIO_NET_CTRL_RX, uapi.VIRTIO_NET_CTRL_MAC, uapi.VIRTIO_NET_CTRL_VLAN
_NO_COMMAND: Any = (0, None, None)
_COMMANDS: dict[tuple[int, int], Any] = {
    (_RX, uapi.VIRTIO_NET_CTRL_RX_PROMISC): (_CTRL_RX, "<B", VirtioNet._set_rx_mode),
    (_RX, uapi.VIRTIO_NET_CTRL_RX_ALLMULTI): (_CTRL_RX, "<B", VirtioNet._set_rx_mode),
    (_RX, uapi.VIRTIO_NET_CTRL_RX_ALLUNI): (_CTRL_RX_EXTRA, "<B", VirtioNet._set_rx_mode),
    (_RX, uapi.VIRTIO_NET_CTRL_RX_NOMULTI): (_CTRL_RX_EXTRA, "<B", VirtioNet._set_rx_mode),
    (_RX, uapi.VIRTIO_NET_CTRL_RX_NOUNI): (_CTRL_RX_EXTRA, "<B", VirtioNet._set_rx_mode),
    (_RX, uapi.VIRTIO_NET_CTRL_RX_NOBCAST): (_CTRL_RX_EXTRA, "<B", VirtioNet._set_rx_mode),
    (_MAC, uapi.VIRTIO_NET_CTRL_MAC_TABLE_SET): (_CTRL_RX, None, VirtioNet._set_mac_table),
    (_MAC, uapi.VIRTIO_NET_CTRL_MAC_ADDR_SET): (_CTRL_MAC_ADDR, "6s", VirtioNet._set_mac),
    (_VLAN, uapi.VIRTIO_NET_CTRL_VLAN_ADD): (_CTRL_VLAN, "<H", VirtioNet._set_vlan),
    (_VLAN, uapi.VIRTIO_NET_CTRL_VLAN_DEL): (_CTRL_VLAN, "<H", VirtioNet._set_vlan),
    (uapi.VIRTIO_NET_CTRL_ANNOUNCE, uapi.VIRTIO_NET_CTRL_ANNOUNCE_ACK): (
        _ANNOUNCE,
        "",
        VirtioNet._acknowledge_announcement,
    ),
    (uapi.VIRTIO_NET_CTRL_MQ, uapi.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET): (
        _MQ,
        "<H",
        VirtioNet._set_queue_pairs,
    ),
    (uapi.VIRTIO_NET_CTRL_GUEST_OFFLOADS, uapi.VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET): (
        _CTRL_GUEST_OFFLOADS,
        "<Q",
        VirtioNet._set_guest_offloads,
    ),
}


class _Control(PythonDevice):
    """Serves the control queue of `net`, and hears of rings that vhost cannot follow."""

    device_id = uapi.VIRTIO_ID_NET

    def __init__(self, net: VirtioNet) -> None:
        super().__init__()
        self._net = net
        self.error_fds: list[int] = []

    def started(self) -> None:
        for fd in self.error_fds:
            self.watch(fd, select.EPOLLIN | select.EPOLLET, self._net.needs_reset)

    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        command = chain.read(2)
        data = chain.read(_LONGEST_COMMAND)
        proper = len(command) == 2 and self._net.execute((command[0], command[1]), data)
        chain.write(bytes([uapi.VIRTIO_NET_OK if proper else uapi.VIRTIO_NET_ERR]))
        chain.complete()


class _ThreadPair:
    """A pair of queues that a thread of ours serves."""

    def __init__(self, net: VirtioNet, native: Any, name: str) -> None:
        self._net = net
        self._native = native
        self._name = name
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        if self._thread is not None:
            lib.virtio_net_pair_stop(self._native)
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        lib.virtio_net_pair_destroy(self._native)

    @property
    def counters(self) -> dict[str, int]:
        counters = lib.virtio_net_pair_counters(self._native)
        return {name: getattr(counters, name) for name in dir(counters)}

    def _serve(self) -> None:
        result = lib.virtio_net_pair_run(self._native)
        while result == lib.VIRTIO_NET_GONE:
            self._net._peer_gone()
            result = lib.virtio_net_pair_run(self._native)
        if result == lib.VIRTIO_NET_STOPPED:
            return
        if result < 0:
            _log().error("%s stopped: %s", self._name, os.strerror(-result))
        self._net.needs_reset()


def _features(port: Port) -> int:
    features = _ALWAYS
    features |= sum(bit for bit, needed in _TX_FEATURES.items() if needed & port.takes == needed)
    gives = sum(bit for bit, needed in _RX_FEATURES.items() if needed & port.gives == needed)
    if gives:
        features |= gives | _CTRL_GUEST_OFFLOADS
    if port.mtu:
        features |= _MTU
    if len(port.fds) > 1:
        features |= _MQ
    if not port.vhost_fds:
        features |= _FILTERS
    return features


def _offloads(features: int, table: dict[int, int]) -> int:
    """The offloads that `features` allow; none is of use without checksums (5.1.3.1)."""
    offloads = 0
    for bit, offload in table.items():
        if features & bit:
            offloads |= offload
    return offloads if offloads & _CSUM else 0


def _log() -> Any:
    import logging  # late: it takes milliseconds

    return logging.getLogger("pyvmm.virtio")
