"""Image formats other than raw, read and written by a qemu-nbd that pyvmm starts and stops."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
from contextlib import suppress
from urllib.parse import quote

from pyvmm.backends.disk import Image, open_file
from pyvmm.backends.nbd import NbdError, NbdImage
from pyvmm.errors import UsageError

PROGRAM = "qemu-nbd"

# qemu-nbd takes the socket as systemd would give it: as descriptor 3, with variables that name its
# process. So it can be connected to from the beginning, and there is no moment to wait for.
_SHELL = 'export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@" 3<&0 </dev/null'

# Seconds that it may take to write what it has cached once nobody is connected, and to say why it
# cannot start.
_PATIENCE = 30.0
_START_PATIENCE = 2.0


class FormatImage(Image):
    """The image at `path` in a `format` that qemu-nbd knows, for as many as `threads` threads.

    UsageError when qemu-nbd or libnbd is missing, or when the image cannot be opened so.
    """

    __slots__ = ("_nbd", "_server")

    def __init__(
        self, path: str, format: str, *, readonly: bool, direct: bool, threads: int
    ) -> None:
        os.close(open_file(path, readonly, direct=False))  # says more clearly what is wrong
        self._server = _Server(path, format, readonly=readonly, direct=direct)
        try:
            self._nbd = NbdImage(self._server.uri, name=path, readonly=readonly, threads=threads)
        except NbdError as error:
            words = self._server.stop(_START_PATIENCE) or str(error)
            raise UsageError(_explain(path, format, words)) from None
        except BaseException:
            self._server.stop()
            raise
        self.name = path
        self.format = format
        self.native = self._nbd.native
        self.readonly = readonly
        self.logical_block_size = self._nbd.logical_block_size
        self.physical_block_size = self._nbd.physical_block_size
        self.discard_granularity = self._nbd.discard_granularity

    def close(self) -> None:
        self._nbd.close()
        self._server.stop()


class _Server:
    """A qemu-nbd for one image, that ends with its last client, and with this process.

    `uri` is that of its socket, which lies in a directory that only this user can enter.
    """

    def __init__(self, path: str, format: str, *, readonly: bool, direct: bool) -> None:
        program = shutil.which(PROGRAM)
        if program is None:
            raise UsageError(
                f"the disk image {path} in {format} format needs {PROGRAM}, which is not "
                "installed: apt install qemu-utils, or make a raw copy elsewhere"
            )
        command = [
            program,
            f"--format={format}",
            "--shared=0",  # any number of connections
            "--discard=unmap",
            f"--cache={'none' if direct else 'writeback'}",
            *(["--read-only"] if readonly else []),
            os.path.abspath(path),
        ]
        self._path = path
        self._words = ""
        self._stopping = False
        self._process: subprocess.Popen[str] | None = None
        self._directory = tempfile.mkdtemp(prefix="pyvmm-nbd-")
        address = os.path.join(self._directory, "socket")
        self.uri = f"nbd+unix:///?socket={quote(address)}"
        started = threading.Event()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            self._keeper = threading.Thread(
                target=self._keep, args=(command, listener, started), name=PROGRAM, daemon=True
            )
            self._keeper.start()
            started.wait()

    def _keep(self, command: list[str], listener: socket.socket, started: threading.Event) -> None:
        """Starts the program and stays until its end: it would end with the thread that started
        it, not with the process (prctl(2), PR_SET_PDEATHSIG)."""
        try:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "sh", "-c", _SHELL, "sh", *command],
                stdin=listener.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C is for us
            )
        except OSError as error:
            self._words = str(error)
            return
        finally:
            started.set()
        with self._process:
            assert self._process.stderr is not None
            self._words = self._process.stderr.read()[-1000:].strip()
        if not self._stopping:
            import logging

            logging.getLogger("pyvmm.backends").error(
                "%s for %s ended: %s", PROGRAM, self._path, self._words or "it does not say why"
            )

    def stop(self, patience: float = _PATIENCE) -> str:
        """Waits for the end, once nobody is connected; what the program said. Idempotent."""
        self._stopping = True
        self._keeper.join(patience)
        if self._keeper.is_alive() and self._process is not None:
            self._process.kill()
            self._keeper.join()
        with suppress(FileNotFoundError):
            shutil.rmtree(self._directory)
        return self._words


def _explain(path: str, format: str, words: str) -> str:
    if re.search(r"Failed to get .*lock", words):
        return (
            f"the disk image {path} is in use by another process: stop that one "
            f"(fuser -v {path} shows it), or give readonly=on or snapshot=on to all that use it"
        )
    line = words.splitlines()[0] if words else "no words"
    line = re.sub(rf"^{PROGRAM}: |Failed to blk_new_open '[^']*': ", "", line)
    line = re.sub(r"^Failed to blk_new_open '[^']*': ", "", line)
    return f"the disk image {path} cannot be opened as {format}: {line}"
