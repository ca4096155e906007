"""``pyvmm nested -- COMMAND``: a command inside an emulated machine with a real /dev/kvm."""

from __future__ import annotations

import argparse

from pyvmm.errors import UsageError

_EPILOG = """\
The machine has this host's root file system, and the command this directory, environment,
terminal, stdin, stdout and stderr; its exit status is that of pyvmm. /run, /dev/shm and the
network are the machine's own. SIGINT and SIGTERM go to the command; a second one stops the machine.
When the command ends, so does everything else in the machine.

In the machine PYVMM_NESTED=1 is set, and 'modprobe NAME [PARAMETER=VALUE]...' loads these modules:
{modules}.

examples:
  pyvmm nested -- ls -l /dev/kvm
  pyvmm nested --memory 6G -- pytest tests/linux
  pyvmm nested -- bash
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from pyvmm.nested.bundle import LAZY_MODULES
    from pyvmm.nested.config import NestedConfig

    parser.usage = "pyvmm nested [OPTION]... -- COMMAND [ARGUMENT]..."
    for setting in NestedConfig.settings.values():
        parser.add_argument(setting.flag, metavar=setting.kind.metavar, help=setting.help)
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.epilog = _EPILOG.format(modules=", ".join(LAZY_MODULES))


def run(args: argparse.Namespace) -> int:
    from pyvmm.nested import run_nested
    from pyvmm.nested.config import NestedConfig
    from pyvmm.schema import Source

    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UsageError("pyvmm nested needs a command: pyvmm nested -- COMMAND...")
    given = {name: getattr(args, name) for name in NestedConfig.settings}
    return run_nested(command, NestedConfig.from_table(given, Source(flags=True)))
