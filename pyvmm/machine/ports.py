"""The named ports of a machine and what they are connected to, from the start or later."""

from __future__ import annotations

import threading

from pyvmm.backends.chardev import open_chardev
from pyvmm.backends.peer import ProgramPeer
from pyvmm.errors import UsageError
from pyvmm.virtio.console import Port, VirtioConsole

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from pyvmm.backends.chardev import Chardev
    from pyvmm.backends.peer import PortStream
    from pyvmm.config import PortConfig


class PortState:
    """What a port is connected to on the host (`address`, such as unix:PATH or pty:/dev/pts/3; that
    of this program is "program"), and whether somebody is there on either side: `host_connected`,
    `guest_open`.
    """

    __slots__ = ("address", "guest_open", "host_connected")

    def __init__(self, address: str, host_connected: bool, guest_open: bool) -> None:
        self.address = address
        self.host_connected = host_connected
        self.guest_open = guest_open

    def __repr__(self) -> str:
        return f"PortState({self.address!r}, {self.host_connected}, {self.guest_open})"


class SerialPorts:
    """A virtio-console (`device`) that owns what its named ports are connected to; a context
    manager. The device must be inactive when it is closed.

    ``on_change(name, open)`` is told, on a thread of the device, when the guest opens a port or
    closes it; `on_quit` as of `open_chardev`.
    """

    def __init__(
        self,
        max_ports: int,
        *,
        on_change: Callable[[str, bool], None],
        on_quit: Callable[[], None] | None = None,
    ) -> None:
        self.device = VirtioConsole(max_ports)
        self._on_change = on_change
        self._on_quit = on_quit
        self._lock = threading.Lock()
        self._ports: dict[str, tuple[PortConfig, Port, Chardev]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for name in list(self._ports):
            self.remove(name)

    def add(self, config: PortConfig) -> str:
        """Opens a port and plugs it in; returns what the user should know about it.

        UsageError when the name is taken, there is no room, and as of `open_chardev`.
        """
        name = config.name
        with self._lock:
            if name in self._ports:
                raise UsageError(f"there is a port {name} already: give another name")
            if len(self._ports) == self.device.max_ports:
                raise UsageError(
                    f"there is no room for port {name} beside {len(self._ports)} others: "
                    "remove one, or start the machine with a larger max_ports"
                )
            chardev = open_chardev(config.kind, config.path, on_quit=self._on_quit, direct=True)
            port = Port(
                chardev,
                name,
                terminal=config.console,
                on_open=lambda open: self._on_change(name, open),
            )
            self._ports[name] = (config, port, chardev)
            self.device.add_port(port)
        return f"port {name} is {chardev.description}" if chardev.description else ""

    def remove(self, name: str) -> None:
        """Unplugs a port and closes what it is connected to. UsageError when there is none."""
        with self._lock:
            _, port, chardev = self._get(name)
            del self._ports[name]
            self.device.remove_port(port)
            chardev.close()

    def open(self, name: str) -> PortStream:
        """As of `VM.port`."""
        config, _, chardev = self._get(name)
        if not isinstance(chardev, ProgramPeer):
            raise UsageError(
                f"port {name} is {_address(config, chardev)}: one for this program has but a name"
            )
        return chardev.open()

    def hang_up(self) -> None:
        """The guest is gone for good."""
        for _, _, chardev in list(self._ports.values()):
            chardev.hang_up()

    def states(self) -> dict[str, PortState]:
        """As of `VM.ports`."""
        return {
            name: PortState(_address(config, chardev), port.host_connected, port.guest_open)
            for name, (config, port, chardev) in list(self._ports.items())
        }

    def _get(self, name: str) -> tuple[PortConfig, Port, Chardev]:
        if name not in self._ports:
            known = f"there are {', '.join(self._ports)}" if self._ports else "it has none"
            raise UsageError(f"this machine has no port {name}: {known}")
        return self._ports[name]


def _address(config: PortConfig, chardev: Chardev) -> str:
    if config.kind == "pty":
        return f"pty:{chardev.description.rpartition(' ')[2]}"
    return f"{config.kind}:{config.path}" if config.path else config.kind
