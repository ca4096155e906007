"""An NBD server in memory for tests, which misbehaves on demand (NBD's doc/proto.md)."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path

HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA = 1, 2, 4, 8
SEND_TRIM, SEND_WRITE_ZEROES, CAN_MULTI_CONN = 32, 64, 256
ALL = SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | CAN_MULTI_CONN

READ, WRITE, DISC, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
COMMANDS = {READ: "read", WRITE: "write", FLUSH: "flush", TRIM: "trim", WRITE_ZEROES: "zero"}
FUA, NO_HOLE = 1, 2
OPT_EXPORT_NAME, OPT_ABORT, OPT_INFO, OPT_GO = 1, 2, 6, 7
REP_ACK, REP_INFO, REP_ERR_UNSUP = 1, 3, (1 << 31) + 1


class NbdServer:
    """Serves `data` at a Unix socket until `close`; `kill` breaks all connections, too.

    `seen` has (command, flags, offset, length) of each request. While `stalled` is set, requests
    are read and not answered; `fail` is the error that all are answered with.
    """

    def __init__(self, path: Path, data: bytearray, flags: int = ALL, block: int = 0) -> None:
        self.path = path
        self.data = data
        self.flags = HAS_FLAGS | flags
        self.block = block
        self.seen: list[tuple[str, int, int, int]] = []
        self.stalled = threading.Event()
        self.fail = 0
        self.connections: list[socket.socket] = []
        self.start()

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.path}"

    def start(self) -> None:
        """Listens, also again after `kill`."""
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def kill(self) -> None:
        self.close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()

    def close(self) -> None:
        with suppress(OSError):  # wakes accept up
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.path.unlink(missing_ok=True)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                self.connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, EOFError):
            if self._negotiate(connection):
                while self._answer(connection):
                    pass

    def _negotiate(self, connection: socket.socket) -> bool:
        connection.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        _receive(connection, 4)
        while True:
            _, option, length = struct.unpack(">QII", _receive(connection, 16))
            _receive(connection, length)

            def reply(kind: int, data: bytes = b"", option: int = option) -> None:
                header = struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data))
                connection.sendall(header + data)

            if option in (OPT_GO, OPT_INFO):
                reply(REP_INFO, struct.pack(">HQH", 0, len(self.data), self.flags))
                if self.block:
                    reply(REP_INFO, struct.pack(">HIII", 3, self.block, self.block, 1 << 25))
                reply(REP_ACK)
                if option == OPT_GO:
                    return True
            elif option == OPT_ABORT:
                reply(REP_ACK)
                return False
            else:
                reply(REP_ERR_UNSUP)

    def _answer(self, connection: socket.socket) -> bool:
        header = _receive(connection, 28)
        _, flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", header)
        if kind == DISC:
            return False
        data = _receive(connection, length) if kind == WRITE else b""
        self.seen.append((COMMANDS[kind], flags, offset, length))
        if self.stalled.is_set():
            return True
        answer = b""
        if not self.fail:
            if kind == READ:
                answer = bytes(self.data[offset : offset + length])
            elif kind != FLUSH:
                self.data[offset : offset + length] = data or bytes(length)
        connection.sendall(struct.pack(">IIQ", 0x67446698, self.fail, cookie) + answer)
        return True


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data
