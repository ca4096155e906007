"""The public API: each name once, each name real, and nothing imported before it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
    # -S: the finder of an editable install imports a good deal.
    code = (
        f"import sys; sys.path.insert(0, {str(Path.cwd())!r}); before = set(sys.modules); "
        "import pyvmm; print(*sorted(set(sys.modules) - before - {'__future__'}))"
    )
    interpreter = [sys.executable, "-I", "-S", "-c"]
    result = subprocess.run([*interpreter, code], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("pyvmm\n", "")
