"""Talking to qemu-guest-agent, which runs commands and moves files in a guest without a network.

>>> with pyvmm.VM(..., ports=["org.qemu.guest_agent.0"]) as vm:
...     vm.start()
...     with GuestAgent(vm.port("org.qemu.guest_agent.0")) as agent:
...         agent.wait(timeout=120)
...         print(agent.run("uname", "-a").output)

The protocol is that of the manual "QEMU Guest Agent Protocol Reference": JSON, a line each.
"""

from __future__ import annotations

import base64
import json
import time

from pyvmm.errors import PyvmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol, Self

    class Stream(Protocol):
        """A port to the agent: `pyvmm.backends.peer.PortStream`."""

        def read(self, size: int = ..., timeout: float | None = ...) -> bytes: ...
        def write(self, data: bytes, timeout: float | None = ...) -> int: ...
        def close(self) -> None: ...


DEFAULT_TIMEOUT = 30.0
# The agent reads at most 48 MiB at once, and its answers are base64 in one line.
_FILE_CHUNK = 1 << 20
# How often an unfinished command is asked for, and an agent that is not there yet.
_POLL_SECONDS = 0.05
_PING_SECONDS = 2.0
# An answer that follows this byte is in sync with its question (guest-sync-delimited).
_DELIMITER = b"\xff"
_LONGEST_ANSWER = 64 << 20


class AgentError(PyvmmError):
    """The agent refused a command; `error_class` is its word for why."""

    def __init__(self, message: str, error_class: str = "GenericError") -> None:
        super().__init__(message)
        self.error_class = error_class


class AgentTimeout(PyvmmError, TimeoutError):
    """The agent did not answer in time, or has gone."""


class CommandResult:
    """How a command ended: `status` is its exit status, None if signal number `signal` ended it;
    `output` and `errors` are what it wrote to its two streams."""

    __slots__ = ("errors", "output", "signal", "status")

    def __init__(
        self, status: int | None, signal: int | None, output: bytes, errors: bytes
    ) -> None:
        self.status = status
        self.signal = signal
        self.output = output
        self.errors = errors

    def __repr__(self) -> str:
        return f"CommandResult({self.status}, {self.signal}, {self.output!r}, {self.errors!r})"


class GuestAgent:
    """A client of the agent behind `stream`; for one thread at a time.

    A `timeout`, in seconds, is for each answer of the agent. Methods raise AgentError where the
    agent refuses, AgentTimeout where it is silent; the next call is then in sync again.
    """

    def __init__(self, stream: Stream, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.timeout = timeout
        self._stream = stream
        self._received = b""
        self._in_sync = False
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the stream."""
        self._stream.close()

    def wait(self, timeout: float) -> None:
        """Waits until there is an agent that answers: it starts late in the guest's boot."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._sync(min(deadline, time.monotonic() + _PING_SECONDS))
            except AgentTimeout as error:
                if time.monotonic() >= deadline:
                    raise AgentTimeout(f"no agent answered within {timeout:g} s") from error
            else:
                return

    def execute(self, command: str, **arguments: Any) -> Any:
        """Any command of the agent, with ``-`` in names written as ``_`` in `arguments`; its
        ``return``."""
        deadline = time.monotonic() + self.timeout
        if not self._in_sync:
            self._sync(deadline)
        question: dict[str, Any] = {"execute": command}
        if arguments:
            question["arguments"] = {
                name.rstrip("_").replace("_", "-"): value for name, value in arguments.items()
            }
        self._in_sync = False  # unless an answer comes
        self._send(json.dumps(question).encode() + b"\n", deadline)
        answer = self._answer(b"\n", deadline)
        self._in_sync = True
        if "error" in answer:
            error = answer["error"]
            raise AgentError(f"{command}: {error.get('desc')}", error.get("class", ""))
        return answer.get("return")

    def ping(self) -> None:
        """Returns when the agent has answered."""
        self.execute("guest-ping")

    def run(
        self,
        program: str,
        *arguments: str,
        stdin: bytes = b"",
        env: list[str] | None = None,
        timeout: float | None = None,
    ) -> CommandResult:
        """Runs a program in the guest to its end, which AgentTimeout says did not come within
        `timeout` seconds; `env` is its environment as NAME=VALUE."""
        settings: dict[str, Any] = {"path": program, "arg": list(arguments)}
        if stdin:
            settings["input_data"] = base64.b64encode(stdin).decode()
        if env is not None:
            settings["env"] = env
        pid = self.execute("guest-exec", capture_output=True, **settings)["pid"]
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            status = self.execute("guest-exec-status", pid=pid)
            if status["exited"]:
                return CommandResult(
                    status.get("exitcode"),
                    status.get("signal"),
                    base64.b64decode(status.get("out-data", "")),
                    base64.b64decode(status.get("err-data", "")),
                )
            if deadline is not None and time.monotonic() >= deadline:
                raise AgentTimeout(f"{program} did not end within {timeout:g} s")
            time.sleep(_POLL_SECONDS)

    def read_file(self, path: str) -> bytes:
        """The contents of a file in the guest."""
        handle = self.execute("guest-file-open", path=path, mode="r")
        try:
            data = b""
            while True:
                part = self.execute("guest-file-read", handle=handle, count=_FILE_CHUNK)
                data += base64.b64decode(part["buf-b64"])
                if part["eof"]:
                    return data
        finally:
            self.execute("guest-file-close", handle=handle)

    def write_file(self, path: str, data: bytes) -> None:
        """Makes `data` the contents of a file in the guest."""
        handle = self.execute("guest-file-open", path=path, mode="w")
        try:
            view = memoryview(data)
            while view:
                part = base64.b64encode(view[:_FILE_CHUNK]).decode()
                written = self.execute("guest-file-write", handle=handle, buf_b64=part)
                view = view[written["count"] :]
        finally:
            self.execute("guest-file-close", handle=handle)

    def freeze(self) -> int:
        """Has all file systems of the guest written out and hold writes; returns how many."""
        return int(self.execute("guest-fsfreeze-freeze"))

    def thaw(self) -> int:
        """Ends `freeze`; returns how many file systems were thawed."""
        return int(self.execute("guest-fsfreeze-thaw"))

    @property
    def frozen(self) -> bool:
        """Whether the file systems are frozen."""
        return bool(self.execute("guest-fsfreeze-status") == "frozen")

    def _sync(self, deadline: float) -> None:
        """Skips what earlier questions have left, in either direction (guest-sync-delimited)."""
        self._number += 1
        number = int(time.time() * 1000) % (1 << 31) + self._number
        question = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        self._send(_DELIMITER + json.dumps(question).encode() + b"\n", deadline)
        while True:
            skipped = self._take(_DELIMITER, deadline)
            self._received = self._received[skipped:]
            if self._answer(b"\n", deadline).get("return") == number:
                self._in_sync = True
                return

    def _send(self, data: bytes, deadline: float) -> None:
        left = max(0.0, deadline - time.monotonic())
        if self._stream.write(data, timeout=left) < len(data):
            raise AgentTimeout("the agent takes no commands")

    def _answer(self, end: bytes, deadline: float) -> dict[str, Any]:
        at = self._take(end, deadline)
        line, self._received = self._received[:at], self._received[at:]
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise AgentError(f"the agent answered no JSON object: {line[:80]!r}")
        return answer

    def _take(self, end: bytes, deadline: float) -> int:
        """Receives until `end`; returns the position after it."""
        start = 0
        while (at := self._received.find(end, start)) < 0:
            start = len(self._received)
            if start > _LONGEST_ANSWER:
                raise AgentError("the agent's answer does not end")
            left = deadline - time.monotonic()
            try:
                data = self._stream.read(timeout=max(0.0, left))
            except TimeoutError as error:
                raise AgentTimeout("the agent did not answer in time") from error
            if not data:
                raise AgentTimeout("the guest has ended, or the port was removed")
            self._received += data
        return at + len(end)
