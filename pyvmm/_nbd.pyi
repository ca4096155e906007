"""The NBD client as Python sees it: ``_native/nbd.cdef``, documented in ``blk_nbd.h``.

There where libnbd was found when pyvmm was built.
"""

from typing import Any

from pyvmm._core import _Ffi

class _Lib:
    BLK_NBD_CONNECT_MS: int
    BLK_NBD_RETRY_MS: int
    def blk_nbd_open(
        self, uri: bytes, answer_ms: int, info: Any, error: Any, error_size: int
    ) -> Any: ...
    def blk_nbd_close(self, nbd: Any) -> None: ...
    def blk_nbd_remote(self, nbd: Any) -> Any: ...
    def blk_nbd_has_tls(self) -> bool: ...

ffi: _Ffi
lib: _Lib
