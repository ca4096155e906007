"""The disks of a VM by their names, as far as that needs no guest."""

from __future__ import annotations

import pytest

import pyvmm
from pyvmm.errors import UsageError
from pyvmm.machine.vm import _disk_name


def test_names() -> None:
    names = [_disk_name(index) for index in (0, 1, 25, 26, 27, 701, 702)]
    assert names == ["vda", "vdb", "vdz", "vdaa", "vdab", "vdzz", "vdaaa"]


def test_unknown_disks_and_bad_numbers() -> None:
    vm = pyvmm.VM(kernel="k", disks=["a", "b"])
    with pytest.raises(UsageError) as caught:
        vm.resize_disk("vdc", "1G")
    assert str(caught.value) == "there is no disk vdc (there: none)"
    with pytest.raises(UsageError) as caught:
        vm.resize_disk("vda", "1X")
    assert str(caught.value) == (
        "size=1X is not a size: give a number with K, M, G or T, such as 512M"
    )
    with pytest.raises(UsageError) as caught:
        vm.limit_disk("vda", iops=-1)
    assert str(caught.value) == "there is no disk vda (there: none)"
