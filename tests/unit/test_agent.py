"""The client of qemu-guest-agent, with an agent that a thread plays."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pyvmm.backends.peer import PortStream, ProgramPeer
from pyvmm.guest.agent import AgentError, AgentTimeout, GuestAgent

Answer = Callable[[str, dict[str, Any]], object]


class FakeAgent:
    """Answers guest-sync-delimited itself, and the rest as `answer` says."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self.answer: Answer = lambda command, arguments: {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._end.close()

    def _run(self) -> None:
        with self._end.makefile("rb") as lines:
            for line in lines:
                question = json.loads(line.lstrip(b"\xff"))
                command, arguments = question["execute"], question.get("arguments", {})
                answer: object
                if command == "guest-sync-delimited":
                    self._end.sendall(b"\xff")
                    answer = {"return": arguments["id"]}
                else:
                    answer = self.answer(command, arguments)
                if answer is None:
                    continue
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self._end.sendall(data + b"\n")


@pytest.fixture
def fake() -> Iterator[tuple[FakeAgent, GuestAgent]]:
    own, other = socket.socketpair()
    fake = FakeAgent(other)
    with GuestAgent(PortStream(own, ProgramPeer()), timeout=10) as agent:
        yield fake, agent
        fake.close()


def test_commands_and_what_they_return(fake: tuple[FakeAgent, GuestAgent]) -> None:
    agent = fake[1]
    fake[0].answer = lambda command, arguments: {"return": [command, arguments]}
    agent.wait(timeout=10)
    assert agent.execute("guest-info") == ["guest-info", {}]
    assert agent.execute("guest-x", buf_b64="a", count=3) == [
        "guest-x",
        {"buf-b64": "a", "count": 3},
    ]


def test_a_refusal(fake: tuple[FakeAgent, GuestAgent]) -> None:
    fake[0].answer = lambda *_: {"error": {"class": "CommandNotFound", "desc": "it is disabled"}}
    with pytest.raises(AgentError) as error:
        fake[1].execute("guest-exec")
    assert str(error.value) == "guest-exec: it is disabled"
    assert error.value.error_class == "CommandNotFound"


def test_an_answer_that_is_late_is_not_taken_for_the_next(
    fake: tuple[FakeAgent, GuestAgent],
) -> None:
    agent = fake[1]
    fake[0].answer = lambda *_: None
    agent.timeout = 0.05
    with pytest.raises(AgentTimeout, match="the agent did not answer in time"):
        agent.execute("guest-slow")
    fake[0]._end.sendall(b'{"return": "late"}\n')
    fake[0].answer = lambda *_: {"return": "now"}
    agent.timeout = 10
    assert agent.execute("guest-info") == "now"


@pytest.mark.parametrize("answer", [b"what?", b"[1]", b"\xff\xfe"])
def test_nonsense(fake: tuple[FakeAgent, GuestAgent], answer: bytes) -> None:
    fake[0].answer = lambda *_: answer
    with pytest.raises(AgentError, match="the agent answered no JSON object"):
        fake[1].ping()
    fake[0].answer = lambda *_: {"return": {}}
    fake[1].ping()


def test_a_command_with_input_and_output(fake: tuple[FakeAgent, GuestAgent]) -> None:
    asked = []

    def answer(command: str, arguments: dict[str, Any]) -> object:
        asked.append((command, arguments))
        if command == "guest-exec":
            return {"return": {"pid": 7}}
        if len(asked) < 4:
            return {"return": {"exited": False}}
        out = base64.b64encode(b"out").decode()
        return {"return": {"exited": True, "exitcode": 3, "out-data": out}}

    fake[0].answer = answer
    result = fake[1].run("/bin/cat", "-n", stdin=b"in", env=["A=1"])
    assert (result.status, result.signal, result.output, result.errors) == (3, None, b"out", b"")
    assert asked[0] == (
        "guest-exec",
        {
            "path": "/bin/cat",
            "arg": ["-n"],
            "capture-output": True,
            "input-data": "aW4=",
            "env": ["A=1"],
        },
    )
    assert asked[1:] == [("guest-exec-status", {"pid": 7})] * 3


def test_a_command_that_does_not_end(fake: tuple[FakeAgent, GuestAgent]) -> None:
    fake[0].answer = lambda command, _: {
        "return": {"pid": 7} if command == "guest-exec" else {"exited": False}
    }
    with pytest.raises(AgentTimeout, match=r"sleep did not end within 0\.1 s"):
        fake[1].run("sleep", "1000", timeout=0.1)


def test_files_go_in_parts(fake: tuple[FakeAgent, GuestAgent]) -> None:
    content = bytes(range(256)) * 5000
    written = bytearray()
    at = 0

    def answer(command: str, arguments: dict[str, Any]) -> object:
        nonlocal at
        if command == "guest-file-open":
            return {"return": 1000}
        if command == "guest-file-read":
            part = content[at : at + arguments["count"]]
            at += len(part)
            encoded = base64.b64encode(part).decode()
            return {"return": {"count": len(part), "buf-b64": encoded, "eof": at == len(content)}}
        if command == "guest-file-write":
            part = base64.b64decode(arguments["buf-b64"])[:300_000]
            written.extend(part)
            return {"return": {"count": len(part), "eof": False}}
        return {"return": {}}

    fake[0].answer = answer
    assert fake[1].read_file("/etc/passwd") == content
    fake[1].write_file("/tmp/x", content)
    assert written == content


def test_an_agent_that_is_not_there() -> None:
    own, other = socket.socketpair()
    agent = GuestAgent(PortStream(own, ProgramPeer()))
    with pytest.raises(AgentTimeout, match=r"no agent answered within 0\.1 s"):
        agent.wait(timeout=0.1)
    other.close()
    with pytest.raises((AgentTimeout, BrokenPipeError)):
        agent.ping()
    agent.close()
