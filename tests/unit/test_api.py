"""The public API: each name once, each name real, and nothing imported before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pyvmm


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
    code = (
        "import sys; before = set(sys.modules); import pyvmm; "
        "print(*sorted(set(sys.modules) - before - {'__future__'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("pyvmm\n", "")
