"""User-mode networking as Python sees it: ``_native/slirp.cdef``, documented in ``slirp_net.h``.

There where libslirp was found when pyvmm was built.
"""

from typing import Any

from pyvmm._core import _Ffi

class _Lib:
    SLIRP_NET_MTU_MIN: int
    SLIRP_NET_MTU_MAX: int
    def slirp_net_create(self, config: Any) -> Any: ...
    def slirp_net_destroy(self, net: Any) -> None: ...
    def slirp_net_forward(
        self, net: Any, udp: bool, host: int, host_port: int, guest: int, guest_port: int
    ) -> int: ...
    def slirp_net_engine(self, net: Any) -> Any: ...
    def slirp_net_counters(self, net: Any) -> Any: ...

ffi: _Ffi
lib: _Lib
