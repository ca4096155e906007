"""``pyvmm ctl``: what it sends, what it shows, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm import cli
from pyvmm.cli.ctl import read_arguments
from pyvmm.control import client
from pyvmm.control.commands import COMMANDS
from pyvmm.errors import UsageError

GREETING = {"QMP": {"version": {}, "capabilities": []}}
EVENT = {
    "timestamp": {"seconds": 1_000_000_000, "microseconds": 42},
    "event": "STOP",
    "data": {"a": 1},
}

Serve = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


@pytest.fixture
def serve(path: Path) -> Iterator[Serve]:
    """Has one client at `path` greeted and answered; what it sent is in the list."""
    threads: list[threading.Thread] = []
    listener = socket.socket(socket.AF_UNIX)

    def serve(*answers: object, greeting: bytes | None = None) -> list[dict[str, Any]]:
        requests: list[dict[str, Any]] = []
        listener.bind(str(path))
        listener.listen()

        def run() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as lines:
                connection.sendall(greeting or json.dumps(GREETING).encode() + b"\n")
                for answer in ({"return": {}}, *answers):
                    if not (line := lines.readline()):
                        return
                    requests.append(json.loads(line))
                    each = answer if isinstance(answer, tuple) else (answer,)
                    connection.sendall(b"".join(json.dumps(m).encode() + b"\n" for m in each))

        threads.append(threading.Thread(target=run))
        threads[0].start()
        return requests

    yield serve
    for thread in threads:
        thread.join()
    listener.close()


def test_a_result_is_printed_as_json(
    serve: Serve, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = serve((EVENT, {"return": {"status": "running"}}))
    assert cli.main(["ctl", str(path), "query-status"]) == 0
    assert json.loads(capsys.readouterr().out) == {"status": "running"}
    assert requests == [
        {"execute": "qmp_capabilities", "arguments": {}},
        {"execute": "query-status", "arguments": {}},
    ]


def test_no_result_prints_nothing(
    serve: Serve, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = serve({"return": {}})
    assert cli.main(["ctl", str(path), "set_link", "name=net0", "up=off"]) == 0
    assert capsys.readouterr() == ("", "")
    assert requests[1]["arguments"] == {"name": "net0", "up": False}


def test_an_error_is_the_machines(
    serve: Serve, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve({"error": {"class": "GenericError", "desc": "there is no disk vdz"}})
    assert cli.main(["ctl", str(path), "block_resize", "device=vdz", "size=1G"]) == 2
    assert capsys.readouterr() == ("", "pyvmm: error: there is no disk vdz\n")


def test_events_are_shown_until_the_end(
    serve: Serve, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    no_data = {name: EVENT[name] for name in ("timestamp", "event")}
    requests = serve()
    monkeypatch.setattr(
        client.QmpClient, "_receive", _with_events(client.QmpClient._receive, [EVENT, no_data])
    )
    assert cli.main(["ctl", str(path), "events"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith('.000042 STOP {"a": 1}')
    assert second.endswith(".000042 STOP")
    assert len(requests) == 1


def _with_events(receive: Any, events: list[dict[str, Any]]) -> Any:
    """The greeting and an answer, then those."""
    left = [None, None, *events]

    def receive_or_take(self: client.QmpClient) -> Any:
        if not left:
            raise ValueError
        message = left.pop(0)
        return receive(self) if message is None else message

    return receive_or_take


@pytest.mark.parametrize(
    ("command", "words", "arguments"),
    [
        ("block_resize", ["device=vda", "size=20G"], {"device": "vda", "size": 20 << 30}),
        ("block_resize", ["size=512", "node-name=7"], {"node-name": "7", "size": 512}),
        ("set_link", ["name=net0", "up=true"], {"name": "net0", "up": True}),
        ("eject", ["id=cd0", "force=on"], {"id": "cd0", "force": True}),
        (
            "device_add",
            ["driver=scsi-hd", "path=a.img", "lun=5"],
            {"driver": "scsi-hd", "path": os.path.abspath("a.img"), "lun": "5"},  # noqa: PTH100
        ),
        (
            "blockdev-add",
            ["driver=raw", 'file={"driver": "file", "filename": "/x"}'],
            {"driver": "raw", "file": {"driver": "file", "filename": "/x"}},
        ),
        (
            "chardev-add",
            ["id=1", 'backend={"type": "file", "data": {"out": "/x"}}'],
            {"id": "1", "backend": {"type": "file", "data": {"out": "/x"}}},
        ),
        ("of-another-monitor", ["a=b=c", "n=[1]"], {"a": "b=c", "n": [1]}),
    ],
)
def test_arguments(command: str, words: list[str], arguments: dict[str, object]) -> None:
    assert read_arguments(command, words) == arguments


@pytest.mark.parametrize(
    ("command", "words", "sentence"),
    [
        ("stop", ["now"], "'now' is not KEY=VALUE"),
        ("set_link", ["name=a", "name=b"], "name is given twice"),
        ("set_link", ["up=yes"], "up=yes is neither on nor off"),
        (
            "block_resize",
            ["size=big"],
            "size=big is not a size: give a number with K, M, G or T, such as 512M",
        ),
        (
            "blockdev-add",
            ["file={"],
            "file={ is no JSON: Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)",
        ),
    ],
)
def test_arguments_that_are_wrong(command: str, words: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_arguments(command, words)
    assert str(caught.value) == sentence


class TestNoMachine:
    def refusal(self, path: Path | str, capsys: pytest.CaptureFixture[str]) -> str:
        assert cli.main(["ctl", str(path), "query-status"]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        return said.err.removeprefix("pyvmm: error: ").rstrip("\n")

    def test_nothing_is_there(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.refusal(path, capsys) == (
            f"there is no socket {path}: 'pyvmm run --qmp unix:{path}' makes it"
        )

    def test_a_file(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path.write_text("x")
        assert self.refusal(path, capsys) == f"{path} is no socket: name the one of --qmp"

    def test_one_that_was_left_behind(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        assert self.refusal(path, capsys) == f"nobody listens on {path}: its machine has ended"

    def test_no_permission(
        self, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(self: socket.socket, address: str) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        assert self.refusal(path, capsys) == (
            f"no permission to use {path}: it is another user's (ls -l tells whose)"
        )

    @pytest.mark.parametrize("greeting", [b"login: \n", b"{}\n", b"7\n"])
    def test_another_kind_of_socket(
        self, serve: Serve, path: Path, capsys: pytest.CaptureFixture[str], greeting: bytes
    ) -> None:
        serve(greeting=greeting)
        expected = f"{path} does not speak QMP: name the socket of --qmp"
        assert self.refusal(path, capsys) == expected

    def test_one_that_says_nothing(
        self, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "_GREETING_SECONDS", 0.1)
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(str(path))
            silent.listen()
            expected = f"{path} does not speak QMP: name the socket of --qmp"
            assert self.refusal(path, capsys) == expected

    def test_a_path_that_no_socket_has(self, capsys: pytest.CaptureFixture[str]) -> None:
        path = "x" * 200
        assert self.refusal(path, capsys) == f"{path} cannot be used: AF_UNIX path too long"

    def test_an_end_before_the_answer(
        self, serve: Serve, path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        serve()
        assert self.refusal(path, capsys) == (
            f"the machine of {path} ended before it answered query-status"
        )


def test_the_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["ctl", "--help"])
    help = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert (f"  {name} " in help and command.help in help) == (name != "qmp_capabilities")
    assert "  events " in help


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["s"], "the following arguments are required: COMMAND (see pyvmm ctl --help)"),
        (["s", "events", "a=1"], "events has no arguments: leave a=1 out"),
    ],
)
def test_usage(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ctl", *argv]) == 2
    assert capsys.readouterr().err == f"pyvmm: error: {sentence}\n"
