"""A vCPU: one thread that sits in the C run loop and comes back for what is Python's."""

from __future__ import annotations

import os
import threading

from pyvmm._core import ffi, lib
from pyvmm.errors import KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.kvm.handles import Vcpu
    from pyvmm.machine.bus import Bus


class VcpuThread:
    """Runs one vCPU; it can be paused, resumed and stopped from other threads at any time.

    `on_exit` is called on the vCPU's thread, once, when KVM returned an exit that ends the guest or
    that nobody knows; `on_error` when the monitor itself failed. Neither is called after `stop`.
    """

    def __init__(
        self,
        handle: Vcpu,
        index: int,
        pio: Bus,
        mmio: Bus,
        *,
        on_exit: Callable[[VcpuThread], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self.handle = handle
        self.index = index
        self._pio = pio
        self._mmio = mmio
        self._on_exit = on_exit
        self._on_error = on_error
        self._pin = ffi.from_buffer(handle.run_buffer)
        self._native = lib.vcpu_create(
            handle.fd, ffi.cast("struct kvm_run *", self._pin), pio.native, mmio.native
        )
        if self._native == ffi.NULL:
            raise MemoryError("no memory for a vCPU")
        self._state = threading.Condition()
        self._paused = False
        self._stopping = False
        self._parked = False
        self._waiting = False  # to go on
        self._settling = False
        self._thread = threading.Thread(target=self._main, name=f"vcpu{index}", daemon=True)

    def start(self) -> None:
        """Starts the thread; the guest runs."""
        self._thread.start()

    def pause(self) -> None:
        """Returns when the vCPU executes no more guest code; idempotent. Also before `start`."""
        with self._state:
            self._paused = True
            lib.vcpu_kick(self._native)
            self._state.wait_for(lambda: self._parked or self._thread.ident is None)

    def settle(self) -> None:
        """Has KVM prepare a paused vCPU for what follows, but execute nothing: see vcpu_settle."""
        with self._state:
            if self._waiting:
                self._settling = True
                self._state.notify_all()
                self._state.wait_for(lambda: not self._settling)

    def resume(self) -> None:
        """Lets a paused vCPU go on; idempotent."""
        with self._state:
            self._paused = False
            self._state.notify_all()

    def request_stop(self) -> None:
        """Makes the thread end soon; `close` waits for it. Any thread, also this one."""
        with self._state:
            self._stopping = True
            self._state.notify_all()
        lib.vcpu_kick(self._native)

    def close(self) -> None:
        """Stops the thread and frees the vCPU."""
        self.request_stop()
        if self._thread.ident is not None:
            self._thread.join()
        lib.vcpu_destroy(self._native)
        ffi.release(self._pin)
        self.handle.close()

    @property
    def thread_id(self) -> int:
        """Its number on the host (TID); 0 before `start`."""
        return self._thread.native_id or 0

    @property
    def counters(self) -> dict[str, int]:
        """Exits so far, by what became of them."""
        counters = lib.vcpu_counters(self._native)
        return {name: getattr(counters, name) for name in dir(counters)}

    def _main(self) -> None:
        try:
            while self._run_once():
                pass
        except BaseException as error:
            self._on_error(error)
        finally:
            with self._state:
                self._parked = True
                self._state.notify_all()

    def _run_once(self) -> bool:
        """Runs the guest up to the next event; False when the thread is to end."""
        result = lib.vcpu_run(self._native)
        if result == lib.VCPU_IO:
            io = lib.vcpu_pending_io(self._native)
            (self._mmio if io.is_mmio else self._pio).access(io)
            return True
        if result == lib.VCPU_KICKED:
            return self._park()
        if result == lib.VCPU_FAILED:
            error = lib.vcpu_error(self._native)
            raise KvmError(f"KVM_RUN of vCPU {self.index} failed: {os.strerror(error)}", error)
        self._on_exit(self)
        return False

    def _park(self) -> bool:
        with self._state:
            self._parked = self._waiting = True
            self._state.notify_all()
            while not self._stopping and self._paused:
                self._state.wait()
                if self._settling:
                    lib.vcpu_settle(self._native)
                    self._settling = False
                    self._state.notify_all()
            self._parked = self._waiting = False
            return not self._stopping
