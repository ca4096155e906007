"""virtio-console: terminals and named ports (virtio 1.2, section 5.3).

What is rare is here: configuration space, control queues, who is connected. Bytes are moved in C,
for all ports by one thread that sits in ``virtio_console_run``.
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
    from collections.abc import Callable
    from typing import Any, Protocol

    from pyvmm.virtio.queue import Chain, Virtqueue

    class ByteStream(Protocol):
        """The host's side of a port; see ``pyvmm.backends.chardev.Chardev``."""

        fds: tuple[int | None, int | None]
        on_resize: Callable[[], None] | None
        on_connect: Callable[[], None] | None

        def size(self) -> tuple[int, int] | None: ...
        def disconnect(self) -> None: ...
        def guest_opened(self, open: bool) -> None: ...


# Port 0 is what a driver without MULTIPORT takes for the console (5.3.5), so the ports of a device
# with MULTIPORT begin with 1. KVM takes some 900 notification addresses of a machine, and a port
# has two.
MAX_PORTS = 255

_CONFIG = struct.Struct("<HHII")  # struct virtio_console_config (5.3.4)
_CONTROL = struct.Struct("<IHH")  # struct virtio_console_control (5.3.6.2)
_RESIZE = struct.Struct("<HH")  # columns and rows, which follow VIRTIO_CONSOLE_RESIZE
_CONTROL_QUEUES = (2, 3)  # from the device to the driver, and back


class Port:
    """A port of the console: `stream` on one side, a program of the guest on the other.

    A `terminal` is one of the guest's consoles (hvc0 and so on), others are streams of bytes; both
    have a `name` where the device has several ports. `watch` is a ``struct console_watch *`` that
    sees all output, and which outlives the device. `on_open` is told, on a thread of the device,
    when the guest opens its side or closes it.
    """

    def __init__(
        self,
        stream: ByteStream,
        name: str = "",
        *,
        terminal: bool = False,
        watch: Any = ffi.NULL,
        on_open: Callable[[bool], None] | None = None,
    ) -> None:
        self.stream = stream
        self.name = name
        self.terminal = terminal
        self.watch = watch
        self.number = 0
        self.guest_open = False
        self._on_open = on_open
        self._ready = False  # the driver has it
        self._attached = False  # the C side has the descriptors of its stream

    @property
    def host_connected(self) -> bool:
        """Whether somebody is there on the host's side."""
        return self.stream.fds != (None, None)

    def _set_guest_open(self, open: bool) -> None:
        if self.guest_open != open:
            self.guest_open = open
            self.stream.guest_opened(open)
            if self._on_open is not None:
                self._on_open(open)


class VirtioConsole(VirtioDevice):
    """A console with room for `max_ports` named ports, or, without that, for one terminal.

    Ports may be added and removed at any time, by any thread.
    """

    device_id = uapi.VIRTIO_ID_CONSOLE

    def __init__(self, max_ports: int | None = None, *, queue_size: int = 128) -> None:
        super().__init__()
        self.max_ports = max_ports
        self.ports: dict[int, Port] = {}
        self._first = 0 if max_ports is None else 1
        self._port_count = 1 if max_ports is None else 1 + max_ports
        pairs = 1 if max_ports is None else 1 + self._port_count
        self.queue_sizes = (queue_size, queue_size) * pairs
        self.features = 0
        if max_ports is not None:
            self.features = 1 << uapi.VIRTIO_CONSOLE_F_MULTIPORT | 1 << uapi.VIRTIO_CONSOLE_F_SIZE
        self._size = (0, 0)
        self._lock = threading.RLock()  # guards what follows, and ports
        self._native: Any = None
        self._thread: threading.Thread | None = None
        self._control = _Control(self)
        self._control.attach(self.config_changed, self.needs_reset)

    # Ports

    def add_port(self, port: Port) -> None:
        """Adds a port, which the guest sees at once. ValueError when there is no room for it."""
        with self._lock:
            numbers = range(self._first, self._port_count)
            free = next((number for number in numbers if number not in self.ports), None)
            if free is None:
                raise ValueError(f"there are {len(self.ports)} ports already")
            port.number = free
            self.ports[free] = port
            port.stream.on_connect = lambda: self._connect(port)
            if port.terminal and port.stream.size() is not None:
                port.stream.on_resize = lambda: self._resized(port)
                if self.max_ports is None:
                    self.features |= 1 << uapi.VIRTIO_CONSOLE_F_SIZE
            if self._native is not None:
                self._attach(port)
            self._control.post(port, uapi.VIRTIO_CONSOLE_PORT_ADD)

    def remove_port(self, port: Port) -> None:
        """Takes a port away from the guest; its stream is free when this returns."""
        with self._lock:
            del self.ports[port.number]
            port.stream.on_connect = port.stream.on_resize = None
            if self._native is not None:
                lib.virtio_console_disconnect(self._native, port.number)
                lib.virtio_console_set_open(self._native, port.number, False)
                lib.virtio_console_set_watch(self._native, port.number, ffi.NULL)
            port._ready = port._attached = False
            self._control.post(port, uapi.VIRTIO_CONSOLE_PORT_REMOVE)
        port._set_guest_open(False)

    def _attach(self, port: Port) -> None:
        lib.virtio_console_set_watch(self._native, port.number, port.watch)
        if self.max_ports is None:
            lib.virtio_console_set_open(self._native, port.number, True)
        self._connect(port)

    def _connect(self, port: Port) -> None:
        """The stream of the port is connected, or was when the device began. Any thread."""
        with self._lock:
            fds = port.stream.fds
            if self._native is None or port._attached or fds == (None, None):
                return
            if self.ports.get(port.number) is not port:
                return
            port._attached = True
            error = lib.virtio_console_connect(
                self._native, port.number, *(-1 if fd is None else fd for fd in fds)
            )
            if error:
                _log().error("port %s: %s", port.name, os.strerror(-error))
            self._tell_connected(port)

    def _disconnect_lost(self) -> None:
        """Lets go of connections that are over. On the control thread, or instead of it."""
        with self._lock:
            while (number := lib.virtio_console_take_lost(self._native)) >= 0:
                port = self.ports[number]
                lib.virtio_console_disconnect(self._native, number)
                port._attached = False
                port.stream.disconnect()
                self._tell_connected(port)

    def _tell_connected(self, port: Port) -> None:
        if port._ready:
            self._control.post(port, uapi.VIRTIO_CONSOLE_PORT_OPEN, int(port.host_connected))

    def _resized(self, port: Port) -> None:
        if self.max_ports is None:
            self.config_changed()
        else:
            with self._lock:
                if port._ready:
                    self._post_size(port)

    def _post_size(self, port: Port) -> None:
        size = port.stream.size()
        if size is not None:
            self._control.post(port, uapi.VIRTIO_CONSOLE_RESIZE, 0, _RESIZE.pack(*size))

    # The device

    def read_config(self) -> bytes:
        """``struct virtio_console_config`` (5.3.4)."""
        if self.max_ports is None and 0 in self.ports:
            self._size = self.ports[0].stream.size() or self._size
        return _CONFIG.pack(*self._size, self._port_count, 0)

    def activate(self, activation: Activation) -> None:
        """Starts the device's threads. OSError when that cannot be."""
        multiport = bool(activation.features & 1 << uapi.VIRTIO_CONSOLE_F_MULTIPORT)
        with self._lock:
            news = self._control.open_news()
            native = lib.virtio_console_create(
                self._port_count, activation.memory, activation.irq, news
            )
            if native == ffi.NULL:
                raise OSError(ffi.errno, os.strerror(ffi.errno))
            self._native = native
            for number in range(self._port_count if multiport else 1):
                first = 2 * number if number == 0 else 2 * number + 2
                rx, tx = activation.queues[first : first + 2]
                if rx and tx:
                    error = lib.virtio_console_set_queues(
                        native, number, rx.config, rx.kick, tx.config, tx.kick
                    )
                    if error:
                        raise OSError(-error, os.strerror(-error))
            for port in self.ports.values():
                self._attach(port)
            self._thread = threading.Thread(
                target=self._serve, args=(native,), name="console", daemon=True
            )
            self._thread.start()
        queues = activation.queues[2:4] if multiport else ()
        control = Activation(activation.memory, activation.features, queues, activation.irq)
        self._control.activate(control)

    def deactivate(self) -> None:
        """Stops serving and frees the queues."""
        self._control.deactivate()  # its thread takes the lock
        with self._lock:
            self._control.close_news()
            if self._native is None:
                return
            if self._thread is not None:
                lib.virtio_console_stop(self._native)
                self._thread.join()
                self._thread = None
            lib.virtio_console_destroy(self._native)
            self._native = None
            ports = list(self.ports.values())
            for port in ports:
                port._ready = port._attached = False
        for port in ports:
            port._set_guest_open(False)

    @property
    def counters(self) -> dict[str, int]:
        """Since activation, all ports together: see ``struct virtio_console_counters``."""
        with self._lock:
            if self._native is None:
                return {}
            counters = lib.virtio_console_counters(self._native)
        return {name: getattr(counters, name) for name in dir(counters)}

    def _serve(self, native: Any) -> None:
        result = lib.virtio_console_run(native)
        if result == lib.VIRTIO_CONSOLE_STOPPED:
            return
        if result < 0:
            _log().error("virtio-console stopped: %s", os.strerror(-result))
        self.needs_reset()

    # Messages of the driver (5.3.6.2). On the control thread.

    def _heard(self, number: int, event: int, value: int) -> None:
        if event == uapi.VIRTIO_CONSOLE_DEVICE_READY:
            if value:
                with self._lock:
                    for port in self.ports.values():
                        self._control.post(port, uapi.VIRTIO_CONSOLE_PORT_ADD)
            return
        with self._lock:
            heard = self.ports.get(number)
            if heard is None:
                return  # none of ours, or removed meanwhile
            if event == uapi.VIRTIO_CONSOLE_PORT_READY:
                heard._ready = bool(value)
                if value:
                    self._introduce(heard)
            elif event == uapi.VIRTIO_CONSOLE_PORT_OPEN:
                lib.virtio_console_set_open(self._native, number, bool(value))
        if event == uapi.VIRTIO_CONSOLE_PORT_OPEN:
            heard._set_guest_open(bool(value))

    def _introduce(self, port: Port) -> None:
        if port.terminal:
            self._control.post(port, uapi.VIRTIO_CONSOLE_CONSOLE_PORT, 1)
            self._post_size(port)
        if port.name:
            self._control.post(port, uapi.VIRTIO_CONSOLE_PORT_NAME, 1, port.name.encode() + b"\0")
        self._tell_connected(port)


class _Control(PythonDevice):
    """Serves the control queues of `console`, and hears of connections that are over."""

    device_id = uapi.VIRTIO_ID_CONSOLE

    def __init__(self, console: VirtioConsole) -> None:
        super().__init__()
        self._console = console
        self._room: list[Chain] = []
        # Messages to the driver that wait for room, the newest of each kind and port last: whatever
        # the driver does, they cannot become many.
        self._messages: dict[tuple[int, int], bytes] = {}
        self._news_fd = -1

    def open_news(self) -> int:
        """Until `close_news`, the eventfd that tells of connections that are over, and messages."""
        self._messages.clear()
        self._news_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return self._news_fd

    def close_news(self) -> None:
        if self._news_fd >= 0:
            os.close(self._news_fd)
            self._news_fd = -1

    def post(self, port: Port, event: int, value: int = 0, more: bytes = b"") -> None:
        """Sends a message to the driver, if it is there. Any thread that has the console's lock."""
        if self._news_fd >= 0:
            key = (port.number, event)
            self._messages.pop(key, None)
            self._messages[key] = _CONTROL.pack(port.number, event, value) + more
            os.eventfd_write(self._news_fd, 1)

    def started(self) -> None:
        self.watch(self._news_fd, select.EPOLLIN, self._news)

    def stopped(self) -> None:
        self._room.clear()

    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        if queue.index == _CONTROL_QUEUES[0]:
            self._room.append(chain)
            self._send()
            return
        message = chain.read(_CONTROL.size)
        chain.complete(0)
        if len(message) == _CONTROL.size:
            self._console._heard(*_CONTROL.unpack(message))

    def _news(self) -> None:
        os.eventfd_read(self._news_fd)
        self._console._disconnect_lost()
        self._send()

    def _send(self) -> None:
        with self._console._lock:
            while self._room and self._messages:
                chain = self._room.pop(0)
                key = next(iter(self._messages))
                if chain.write(self._messages[key]) == len(self._messages[key]):
                    del self._messages[key]
                chain.complete()


def _log() -> Any:
    import logging  # late: it takes milliseconds

    return logging.getLogger("pyvmm.virtio")
