"""Logical units of iSCSI targets, by libiscsi (RFC 7143).

`_native/iscsi_target.c` keeps the session and passes the commands on.
"""

from __future__ import annotations

import os
import socket
import threading

from pyvmm._core import ffi as core_ffi
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SCHEME = "iscsi://"
DEFAULT_PORT = 3260
_LARGEST_LUN = 16383
_BLOCK_LIMITS = 0xB0  # a VPD page

# For a target to answer when the machine is started, in seconds.
CONNECT_TIMEOUT = 10

# For a connection that was lost to come back, before commands fail: less than drivers wait.
WAIT_SECONDS = 20
# An idle connection is asked whether it lives, and given up when three questions have no answer.
PING_SECONDS = 5

_INITIATOR_FILE = "/etc/iscsi/initiatorname.iscsi"


class IscsiUrl:
    """What ``iscsi://[USER%PASSWORD@]HOST[:PORT]/IQN/LUN`` says. UsageError when it is malformed.

    User and password may also come from LIBISCSI_CHAP_USERNAME and LIBISCSI_CHAP_PASSWORD in the
    environment, where not everybody sees them.
    """

    __slots__ = ("host", "lun", "password", "port", "target", "user")

    def __init__(self, url: str) -> None:
        from urllib.parse import unquote

        rest = url.removeprefix(SCHEME)
        authority, _, path = rest.partition("/")
        login, at, place = authority.rpartition("@")
        target, _, lun = path.partition("/")
        self.user, _, self.password = login.partition("%")
        if not at:
            self.user = os.environ.get("LIBISCSI_CHAP_USERNAME", "")
            self.password = os.environ.get("LIBISCSI_CHAP_PASSWORD", "")
        if place.startswith("["):  # an IPv6 address
            self.host, bracket, port = place[1:].partition("]")
            well_formed = bool(bracket) and (not port or port.startswith(":"))
            port = port[1:]
        else:
            self.host, colon, port = place.partition(":")
            well_formed = not colon or bool(port)
        self.target = unquote(target)
        well_formed = (
            well_formed
            and url.startswith(SCHEME)
            and bool(self.host)
            and (not port or (port.isdecimal() and 0 < int(port) < 65536))
            and self.target.startswith(("iqn.", "eui.", "naa."))
            and lun.isdecimal()
        )
        if not well_formed:
            raise UsageError(
                f"{hidden(url)} is not the URL of an iSCSI device: "
                "write iscsi://[USER%PASSWORD@]HOST[:PORT]/IQN/LUN"
            )
        if int(lun) > _LARGEST_LUN:
            raise UsageError(
                f"{hidden(url)}: there is no LUN {lun}: give one from 0 to {_LARGEST_LUN}"
            )
        self.port = int(port or DEFAULT_PORT)
        self.lun = int(lun)

    @property
    def place(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def hidden(url: str) -> str:
    """The URL without a password in it, to be shown."""
    head, at, tail = url.rpartition("@")
    user, percent, _ = head.removeprefix(SCHEME).partition("%")
    return f"{SCHEME}{user}%...@{tail}" if at and percent else url


class IscsiDevice:
    """A logical unit behind a session that is kept as long as it is open; `close` ends it.

    `native` is its ``struct scsi_lun *``. `max_transfer` is how many bytes one command may move,
    which the guest finds in its VPD pages if `tells_limits`. `description` says in words what it
    is, `remark` what the user should know. The session is established when this is made.

    UsageError when the target cannot be reached, refuses the login or has no such logical unit, or
    when pyvmm was built without libiscsi.
    """

    remark = ""

    def __init__(self, url: str) -> None:
        wanted = IscsiUrl(url)
        self.path = hidden(url)
        self._ffi, self._lib = _library()
        portal = _reach(wanted)
        texts = {
            name: self._ffi.new("char[]", text.encode())
            for name, text in (
                ("portal", portal),
                ("target", wanted.target),
                ("initiator", initiator_name()),
                ("user", wanted.user),
                ("password", wanted.password),
            )
        }
        numbers = {
            "lun": wanted.lun,
            "wait_seconds": WAIT_SECONDS,
            "ping_seconds": PING_SECONDS,
        }
        config = self._ffi.new("struct iscsi_target_config *", {**texts, **numbers})
        self._target = self._lib.iscsi_target_create(config)
        if self._target == self._ffi.NULL:
            raise MemoryError("no memory for an iSCSI session")
        try:
            self._connect(wanted)
        except BaseException:
            self._lib.iscsi_target_destroy(self._target)
            raise
        lun = self._lib.iscsi_target_lun(self._target)
        self.native = core_ffi.cast("struct scsi_lun *", int(self._ffi.cast("uintptr_t", lun)))
        self._thread = threading.Thread(target=self._run, name="iscsi", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the session; idempotent. No command may be under way."""
        if self._target != self._ffi.NULL:
            self._lib.iscsi_target_stop(self._target)
            self._thread.join()
            self._lib.iscsi_target_destroy(self._target)
            self._target = self._ffi.NULL

    @property
    def counters(self) -> dict[str, int]:
        """See ``struct iscsi_target_counters``."""
        counters = self._lib.iscsi_target_counters(self._target)
        return {name: getattr(counters, name) for name in ("commands", "sessions", "failed")}

    @property
    def connected(self) -> bool:
        return bool(self._lib.iscsi_target_counters(self._target).connected)

    def _connect(self, wanted: IscsiUrl) -> None:
        words = self._ffi.new("char[]", 256)
        size = self._ffi.sizeof(words)
        if self._lib.iscsi_target_connect(self._target, CONNECT_TIMEOUT, words, size) < 0:
            text = self._ffi.string(words).decode(errors="replace").strip()
            raise UsageError(_explain(wanted, text))
        inquiry = self._query(bytes([0x12, 0, 0, 0, 96, 0]), 96)
        if len(inquiry) < 36 or inquiry[0] >> 5:  # the peripheral qualifier: there is no unit
            raise UsageError(
                f"the iSCSI target {wanted.target} at {wanted.place} has no LUN {wanted.lun}: "
                f"iscsi-ls -s {SCHEME}{wanted.place} lists those it has"
            )
        self.description = " ".join(inquiry[8:36].decode("ascii", "replace").split())
        capacity = self._query(bytes([0x25]) + bytes(9), 8)
        pages = self._query(bytes([0x12, 1, 0, 0, 252, 0]), 252)
        self.tells_limits = _BLOCK_LIMITS in pages[4:]
        self.max_transfer: int = self._lib.SCSI_PASS_MAX_BYTES
        limits = self._ffi.new(
            "struct scsi_pass_limits *",
            {
                "max_transfer": self.max_transfer,
                "block_size": int.from_bytes(capacity[4:8], "big"),
            },
        )
        self._lib.iscsi_target_set_limits(self._target, limits)

    def _query(self, cdb: bytes, size: int) -> bytes:
        """Data-in of a command; empty: it failed. The first may meet a unit attention condition."""
        buffer = self._ffi.new("uint8_t[]", size)
        for _ in range(3):
            count = self._lib.iscsi_target_query(self._target, cdb, len(cdb), buffer, size)
            if count >= 0:
                return bytes(self._ffi.buffer(buffer, count))
        return b""

    def _run(self) -> None:
        result = self._lib.iscsi_target_run(self._target)
        if result < 0:
            import logging

            logger = logging.getLogger("pyvmm.backends")
            logger.error("the session with %s ended: %s", self.path, os.strerror(-result))


def initiator_name() -> str:
    """The IQN that this host goes by: that of its other initiators, else one of our own."""
    try:
        with open(_INITIATOR_FILE, encoding="ascii") as file:
            for line in file:
                name = line.strip().removeprefix("InitiatorName=")
                if name != line.strip() and name:
                    return name
    except (OSError, UnicodeDecodeError):
        pass
    host = "".join(c for c in socket.gethostname().lower() if c.isalnum() or c in "-.") or "host"
    return f"iqn.2026-11.io.pyvmm:{host}"


def _reach(wanted: IscsiUrl) -> str:
    """The portal with a numeric address, once it was found to answer: names are looked up here
    alone, where waiting does not hurt."""
    try:
        with socket.create_connection((wanted.host, wanted.port), CONNECT_TIMEOUT) as connection:
            address = connection.getpeername()[0]
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise UsageError(
            f"the iSCSI target at {wanted.place} cannot be reached ({reason}): "
            "check the address, and that the target runs there"
        ) from error
    return f"[{address}]:{wanted.port}" if ":" in address else f"{address}:{wanted.port}"


def _explain(wanted: IscsiUrl, words: str) -> str:
    if "not found" in words.lower():
        return (
            f"there is no iSCSI target {wanted.target} at {wanted.place}: "
            f"iscsi-ls {SCHEME}{wanted.place} lists those there are"
        )
    if "auth" in words.lower():
        return (
            f"the iSCSI target {wanted.target} at {wanted.place} refuses the login: check user and "
            f"password in {SCHEME}USER%PASSWORD@{wanted.place}/..., and that it lets "
            f"{initiator_name()} in"
        )
    if "reconnect" in words.lower():  # of which the library speaks when it may not
        words = "it closed the connection"
    return (
        f"no session with the iSCSI target {wanted.target} at {wanted.place} ({words}): "
        "check that the target is one"
    )


def _library() -> tuple[Any, Any]:
    try:
        from pyvmm._iscsi import ffi, lib
    except ImportError:
        raise UsageError(
            "an iSCSI device needs libiscsi, which this pyvmm was built without: "
            "install libiscsi-dev and run scripts/setup"
        ) from None
    return ffi, lib
