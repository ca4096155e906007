"""``pyvmm switch``: a switch for virtual machines that is there until it is ended."""

from __future__ import annotations

from pyvmm.errors import ExitStatus

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pyvmm switch PATH"
    parser.epilog = """\
'pyvmm run --net switch=PATH' is a machine on it. A switch is made by the first machine that names
it, and ends with the last one; this command is for one that is there before and after.
"""
    parser.add_argument("path", metavar="PATH", help="the Unix socket that the machines connect to")


def run(args: argparse.Namespace) -> int:
    import signal

    from pyvmm.backends.switch import Switch

    # Blocked, they wait until they are asked for; before there is a thread, which inherits that.
    ends = (signal.SIGINT, signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    try:
        with Switch(args.path) as switch:
            print(f"pyvmm: the switch {switch.path} is there; Ctrl-C ends it", flush=True)
            signal.sigwait(ends)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return ExitStatus.OK
