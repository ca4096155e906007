"""A client of the control socket that sends whatever it is told to."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any, Self


class RawClient:
    """Connects to `path` and takes the greeting; without `negotiate` it is not yet a session."""

    def __init__(self, path: Path | str, *, negotiate: bool = True, timeout: float = 20) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(str(path))
        self._lines = self.socket.makefile("rb")
        self.greeting = self.receive()
        self.events: list[dict[str, Any]] = []  # that came before answers
        if negotiate:
            assert self.execute("qmp_capabilities") == {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> dict[str, Any]:
        """The next message; EOFError when the server has closed."""
        line = self._lines.readline()
        if not line:
            raise EOFError
        assert line.endswith(b"\r\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def answer(self) -> dict[str, Any]:
        """The next message that is no event."""
        while "event" in (message := self.receive()):
            self.events.append(message)
        return message

    def event(self, name: str) -> dict[str, Any]:
        """The next event of that name."""
        while True:
            message = self.events.pop(0) if self.events else self.receive()
            if message.get("event") == name:
                return message

    def ask(self, command: str, /, **arguments: object) -> dict[str, Any]:
        """The whole answer to a command."""
        words = {word.replace("_", "-"): value for word, value in arguments.items()}
        self.send(json.dumps({"execute": command, "arguments": words}).encode())
        return self.answer()

    def execute(self, command: str, /, **arguments: object) -> Any:
        answer = self.ask(command, **arguments)
        assert "return" in answer, answer
        return answer["return"]

    def refusal(self, command: str, /, **arguments: object) -> tuple[str, str]:
        """Class and description of the error that a command ends with."""
        return error_of(self.ask(command, **arguments))


def error_of(answer: dict[str, Any]) -> tuple[str, str]:
    assert set(answer) <= {"error", "id"}, answer
    assert set(answer["error"]) == {"class", "desc"}
    return answer["error"]["class"], answer["error"]["desc"]
