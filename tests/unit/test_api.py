"""The public API: each name once, each name real, and nothing imported before it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pyvmm
from pyvmm import DiskConfig, VmConfig


def test_each_name_is_exported_once_and_resolves() -> None:
    homes = [name for names in pyvmm._HOMES.values() for name in names]
    assert sorted(homes) == sorted(pyvmm.__all__)
    assert len(set(homes)) == len(homes)
    for home, names in pyvmm._HOMES.items():
        for name in names:
            assert getattr(pyvmm, name) is getattr(sys.modules[home], name)
            assert name in dir(pyvmm)


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="module 'pyvmm' has no attribute 'Vm'"):
        _ = pyvmm.Vm


def test_importing_it_imports_nothing() -> None:
    # -S: the finder of an editable install imports a good deal.
    code = (
        f"import sys; sys.path.insert(0, {str(Path.cwd())!r}); before = set(sys.modules); "
        "import pyvmm; print(*sorted(set(sys.modules) - before - {'__future__'}))"
    )
    interpreter = [sys.executable, "-I", "-S", "-c"]
    result = subprocess.run([*interpreter, code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("pyvmm\n", "")


def test_a_machine_of_settings_or_of_a_configuration() -> None:
    vm = pyvmm.VM(kernel="k", memory="64M", disks=["a", {"path": "c", "queues": 2}])
    disks = (DiskConfig(path="a"), DiskConfig(path="c", queues=2))
    assert vm.config == VmConfig(kernel="k", memory=64 << 20, disks=disks)
    assert pyvmm.VM(vm.config).config is vm.config
    with pytest.raises(pyvmm.UsageError) as error:
        pyvmm.VM(kernel="k", memroy="1G")
    assert str(error.value).startswith("unknown key 'memroy' in VmConfig, did you mean 'memory'?")
    with pytest.raises(TypeError, match="VM takes a VmConfig or settings, not both"):
        pyvmm.VM(vm.config, memory="1G")
