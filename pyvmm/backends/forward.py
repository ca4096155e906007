"""Ports of the host that lead to ports of a guest, as they are written."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

EXAMPLE = "tcp:127.0.0.1:2222-:22"


class Forward:
    """`protocol` (tcp or udp) at `host`:`host_port` goes to `guest`:`guest_port`.

    Addresses are IPv4. `host_port` 0 stands for any that is free, `guest` "" for the address that
    DHCP gives.
    """

    __slots__ = ("guest", "guest_port", "host", "host_port", "protocol")

    def __init__(
        self, protocol: str, host: str, host_port: int, guest: str, guest_port: int
    ) -> None:
        self.protocol = protocol
        self.host = host
        self.host_port = host_port
        self.guest = guest
        self.guest_port = guest_port

    @classmethod
    def from_text(cls, text: str) -> Self:
        """From ``tcp:[HOST]:PORT-[GUEST]:PORT``, where HOST is 127.0.0.1 if it is left out.

        Raises ValueError.
        """
        protocol, _, ends = text.partition(":")
        host_end, _, guest_end = ends.partition("-")
        host, _, host_port = host_end.rpartition(":")
        guest, _, guest_port = guest_end.rpartition(":")
        if (
            protocol not in ("tcp", "udp")
            or text != f"{protocol}:{host}:{host_port}-{guest}:{guest_port}"
            or not (_is_port(host_port) and _is_port(guest_port) and int(guest_port))
            or not all(not address or is_address(address) for address in (host, guest))
        ):
            raise ValueError(f"is not a forwarded port: give one such as {EXAMPLE}")
        return cls(protocol, host or "127.0.0.1", int(host_port), guest, int(guest_port))

    def __str__(self) -> str:
        return f"{self.protocol}:{self.host}:{self.host_port}-{self.guest}:{self.guest_port}"

    def __repr__(self) -> str:
        return f"Forward({str(self)!r})"


def is_address(text: str) -> bool:
    """Whether this is an IPv4 address of four decimal numbers."""
    parts = text.split(".")
    return len(parts) == 4 and all(_is_number(part, 255) for part in parts)


def _is_port(text: str) -> bool:
    return _is_number(text, 65535)


def _is_number(text: str, most: int) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5 and int(text) <= most
