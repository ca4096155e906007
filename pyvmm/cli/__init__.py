"""The ``pyvmm`` command: finds the subcommand and turns errors into one sentence and a status.

Each subcommand is a module of this package with ``add_arguments(parser)``, which describes its
options to argparse, and ``run(args) -> int``, which returns the exit status. ``args.argv`` holds
the words that the options were read from. A module whose start-up time matters may have
``quick_arguments(argv)`` too: the same result without argparse, or None where argparse must see to
it. Only the chosen module is imported.
"""

from __future__ import annotations

import gc
import os
import sys

from pyvmm.errors import ExitStatus, PyvmmError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

# What `pyvmm --help` says of each subcommand.
COMMANDS = {
    "run": "start a virtual machine",
    "ctl": "control a running machine through its control socket",
    "doctor": "tell what this machine can do, and how to mend what it cannot",
    "nested": "run a command where there is a real KVM: inside an emulated machine",
    "switch": "join virtual machines to a network of their own",
    "images": "build the guests of the demo and the tests: kernels, initramfs, disks",
}

_HELP = """\
usage: pyvmm COMMAND [ARGUMENT...]

A small, fast virtual machine monitor for Linux guests on KVM.

commands:
{commands}

options:
  -h, --help  show this help; 'pyvmm COMMAND --help' shows that of a command
  --version   show the version

examples:
  pyvmm doctor                                        can this machine run Linux guests?
  pyvmm run --image tiny                              a small Linux, built on first use
  pyvmm run --kernel bzImage --disk disk.img          your kernel, your disk
  pyvmm nested -- dmesg                               a command beside a real /dev/kvm
"""


def entry() -> NoReturn:
    """The ``pyvmm`` command: `main`, and then the end of the process without the interpreter's own,
    which takes 5 to 10 ms to free what the kernel frees anyway."""
    status = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            pass  # nobody reads it
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's) and return its exit status."""
    gc.disable()  # nothing that starting up makes is garbage, and looking for it takes 2 ms
    try:
        status = _dispatch(list(sys.argv[1:] if argv is None else argv))
        if sys.stdout is not None:  # as it is where the caller has closed it
            sys.stdout.flush()
        return status
    except PyvmmError as error:
        _say("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]))
        return error.exit_status
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED
    except BrokenPipeError:
        _die_of_broken_pipe()
    except Exception as error:
        _say(_report_defect(error))
    return ExitStatus.INTERNAL


def _dispatch(argv: list[str]) -> int:
    name, *rest = argv or [""]
    if name in COMMANDS:
        # Not importlib, which imports warnings for its deprecated functions.
        module = __import__(f"pyvmm.cli.{name}", fromlist=["run"])
        quick_arguments = getattr(module, "quick_arguments", None)
        args = quick_arguments(rest) if quick_arguments else None
        if args is None:
            from pyvmm.cli.parser import parse

            args = parse(name, COMMANDS[name], module.add_arguments, rest)
        args.argv = rest
        status: int = module.run(args)
        return status
    if name in ("", "-h", "--help"):
        width = max(map(len, COMMANDS)) + 2
        lines = (f"  {name:{width}}{help}" for name, help in COMMANDS.items())
        print(_HELP.format(commands="\n".join(lines)), end="", file=None if name else sys.stderr)
        return ExitStatus.OK if name else ExitStatus.USAGE
    if name == "--version":
        from importlib.metadata import version

        print("pyvmm", version("pyvmm"))
        return ExitStatus.OK

    from pyvmm.schema import any_of, suggest

    what = "option" if name.startswith("-") else "command"
    hint = suggest(name, COMMANDS) or f": the commands are {any_of(COMMANDS)}"
    raise UsageError(f"unknown {what} {name!r}{hint} (see pyvmm --help)")


def _say(message: str) -> None:
    print(f"pyvmm: {message}", file=sys.stderr)


def _report_defect(error: Exception) -> str:
    """What to tell of an unforeseen exception, whose traceback is shown or kept in a file."""
    import traceback

    text = "".join(traceback.format_exception(error))
    summary = traceback.format_exception_only(error)[-1].strip()
    if os.environ.get("PYVMM_TRACEBACK"):
        return f"internal error\n{text}".rstrip()
    import tempfile

    with tempfile.NamedTemporaryFile("w", prefix="pyvmm-", suffix=".txt", delete=False) as file:
        file.write(f"{sys.argv}\n{text}")
    return (
        f"internal error: {summary} (a defect in pyvmm: please report it with {file.name}; "
        "PYVMM_TRACEBACK=1 shows the traceback here)"
    )


def _die_of_broken_pipe() -> None:
    """End as a C program does when the reader of its output has gone: by SIGPIPE, silently."""
    import signal

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGPIPE)
