"""The port of a network device: what its backend gives it, whatever that backend is."""

from __future__ import annotations

import os

from pyvmm._core import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


class NetPort:
    """A way for Ethernet frames (without FCS) out of the machine and into it.

    `fds` has a file descriptor for each pair of queues that the device may use; they belong to the
    port. `framing` is one of ``lib.NET_FRAMING_...`` (``net_port.h``) and says how frames stand on
    them; with `vnet_hdr` each frame follows a ``struct virtio_net_hdr_v1`` of 12 bytes, in which
    num_buffers has no meaning. Sockets are used without waiting, whatever their flags; other
    descriptors must be non-blocking. A port whose peer has gone reports the end of file.

    With ``lib.NET_FRAMING_CALLS`` there are none: `engine`, a ``struct net_engine *``, takes and
    makes frames on the thread of the device's one pair of queues.

    `takes` and `gives` are ``lib.NET_OFFLOAD_...`` bits, 0 without `vnet_hdr`: what frames of the
    guest may be, and what the port can make frames for the guest be. An engine may give
    ``NET_OFFLOAD_CSUM``, as the checksums of its frames need no verifying.

    `mtu` is the largest payload of a frame, in bytes, that the guest should be told of; 0 tells it
    nothing, and it takes 1500. `vhost_fds` has a ``/dev/vhost-net`` for each of `fds` when the
    kernel is to move the frames.

    `remarks` are sentences that the user should be told once the machine runs.
    """

    def __init__(
        self,
        fds: Sequence[int],
        framing: int,
        *,
        engine: Any = None,
        vnet_hdr: bool = False,
        takes: int = 0,
        gives: int = 0,
        mtu: int = 0,
        vhost_fds: Sequence[int] = (),
        remarks: Sequence[str] = (),
    ) -> None:
        assert vnet_hdr or engine or not (takes | gives or framing == lib.NET_FRAMING_TAP)
        self.fds = tuple(fds)
        self.framing = framing
        self.engine = engine
        self.vnet_hdr = vnet_hdr
        self.takes = takes
        self.gives = gives
        self.mtu = mtu
        self.vhost_fds = tuple(vhost_fds)
        self.remarks = list(remarks)

    def set_offloads(self, offloads: int) -> None:
        """What frames for the guest may be from now on: a subset of `gives`, at first 0."""

    def set_queue_pairs(self, count: int) -> None:
        """How many of `fds`, from the first on, are in use; at first one."""

    def set_link(self, up: bool) -> None:
        """The guest's link is up (as it is at first) or down; its device drops all frames then."""

    def close(self) -> None:
        """Gives everything back; idempotent. The device does not use the port any more."""
        for fd in (*self.fds, *self.vhost_fds):
            os.close(fd)
        self.fds = self.vhost_fds = ()
