"""``pyvmm ctl``: the control socket of a running machine, for people."""

from __future__ import annotations

import os

from pyvmm.errors import ExitStatus, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Any

    from pyvmm.control.client import QmpClient

_EVENTS = "events"
_PATHS = ("filename", "path", "unix", "connect")
_EXAMPLES = """\
examples:
  pyvmm run --image debian --qmp unix:vm.sock
  pyvmm ctl vm.sock query-status
  pyvmm ctl vm.sock block_resize device=vda size=20G
  pyvmm ctl vm.sock device_add driver=scsi-hd id=data path=data.img
  pyvmm ctl vm.sock events
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pyvmm ctl PATH COMMAND [KEY=VALUE...]"
    parser.epilog = f"{_list_commands()}\n\n{_EXAMPLES}"
    parser.add_argument("path", metavar="PATH", help="the socket of 'pyvmm run --qmp unix:PATH'")
    parser.add_argument("command", metavar="COMMAND", help="one of those below")
    parser.add_argument(
        "arguments",
        metavar="KEY=VALUE",
        nargs="*",
        default=(),
        help="an argument: text, a number, a size such as 20G, on or off, or JSON",
    )


def _list_commands() -> str:
    from pyvmm.control.commands import COMMANDS
    from pyvmm.control.protocol import NEGOTIATE

    helps = {name: each.help for name, each in COMMANDS.items() if name != NEGOTIATE}
    helps[_EVENTS] = "show what happens, as it happens, until the machine ends"
    width = max(map(len, helps)) + 2
    return "\n".join(["commands:", *(f"  {name:{width}}{help}" for name, help in helps.items())])


def run(args: argparse.Namespace) -> int:
    from pyvmm.control.client import QmpClient

    if args.command == _EVENTS and args.arguments:
        raise UsageError(f"events has no arguments: leave {args.arguments[0]} out")
    arguments = read_arguments(args.command, args.arguments)
    with QmpClient(args.path) as client:
        if args.command == _EVENTS:
            _show_events(client)
            return ExitStatus.OK
        result = client.execute(args.command, arguments)
    if result != {}:
        import json

        print(json.dumps(result, indent=2))
    return ExitStatus.OK


def read_arguments(command: str, words: Sequence[str]) -> dict[str, Any]:
    """The arguments of a command, each of the type that the command wants. UsageError."""
    from pyvmm.control.commands import COMMANDS

    known = COMMANDS.get(command)
    arguments: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UsageError(f"{word!r} is not KEY=VALUE")
        if key in arguments:
            raise UsageError(f"{key} is given twice")
        if key in _PATHS:
            text = os.path.abspath(text)  # here, not where the machine runs
        arguments[key] = _read(key, text, None if known is None else known.arguments.get(key))
    return arguments


def _read(key: str, text: str, kind: type | None) -> Any:
    import json

    from pyvmm.schema import Boolean, Size, Source

    try:
        if kind is bool:
            return Boolean().read({"true": "on", "false": "off"}.get(text, text), Source())
        if kind is int:
            return Size(least=0, most=1 << 62, multiple=1).read(text, Source())
        if kind in (None, dict, list) and text.startswith(("{", "[")):
            try:
                return json.loads(text)
            except ValueError as error:
                raise ValueError(f"is no JSON: {error}") from None
    except ValueError as error:
        raise UsageError(f"{key}={text} {error}") from None
    return text


def _show_events(client: QmpClient) -> None:
    import json
    import time

    for event in client.events():
        stamp = event["timestamp"]
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stamp["seconds"]))
        data = f" {json.dumps(event['data'])}" if "data" in event else ""
        print(f"{when}.{stamp['microseconds']:06} {event['event']}{data}", flush=True)
