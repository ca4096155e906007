"""The exit-status contract: one table, and every error keeps to it."""

from __future__ import annotations

import pytest

from pyvmm import errors
from pyvmm.errors import EXIT_STATUSES, ExitStatus, PyvmmError


def all_errors() -> list[type[PyvmmError]]:
    found = [PyvmmError]
    for cls in found:
        found.extend(cls.__subclasses__())
    return [cls for cls in found if cls.__module__ == errors.__name__]


def test_names_and_table_agree() -> None:
    names = {name: value for name, value in vars(ExitStatus).items() if name.isupper()}
    assert sorted(names.values()) == sorted(EXIT_STATUSES)


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: error.__name__)
def test_every_error_ends_in_a_documented_failure(error: type[PyvmmError]) -> None:
    assert error.exit_status in EXIT_STATUSES
    assert error.exit_status != ExitStatus.OK
    assert error.__doc__


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.UsageError, 2),
        (errors.KvmError, 70),
        (errors.NoKvmError, 71),
        (errors.GuestPanic, 80),
        (errors.GuestCrash, 81),
        (errors.GuestTimeout, 124),
    ],
)
def test_contract(error: type[PyvmmError], status: int) -> None:
    assert error.exit_status == status


def test_kvm_error_keeps_the_error_number() -> None:
    error = errors.KvmError("KVM_RUN failed: bad address", 14)
    assert (str(error), error.errno) == ("KVM_RUN failed: bad address", 14)
