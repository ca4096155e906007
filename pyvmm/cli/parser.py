"""argparse as pyvmm speaks it: one sentence for an error, and help that keeps its line breaks.

Imported only where argparse is needed, as that is dear; see :mod:`pyvmm.cli.run`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NoReturn

from pyvmm.errors import UsageError
from pyvmm.schema import suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Like ``parse_args``, with a word about what an unknown option may have been meant for."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            option = unknown[0].partition("=")[0]
            known = [each for action in self._actions for each in action.option_strings]
            if option.startswith("-"):
                self.error(f"unknown option {option}{suggest(option, known)}")
            self.error(f"unexpected argument {unknown[0]!r}")
        return args


def parse(
    name: str,
    summary: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    argv: Sequence[str],
) -> argparse.Namespace:
    """The arguments of the subcommand ``name``. Raises UsageError; ``--help`` prints and exits."""
    parser = Parser(
        prog=f"pyvmm {name}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser)
    return parser.parse_all(argv)
