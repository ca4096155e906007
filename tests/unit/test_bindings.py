"""The generated ctypes structures and constants against this machine's compiler and headers."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pyvmm.boot._generated_uapi
import pyvmm.kvm._generated_more
import pyvmm.kvm._generated_uapi
import pyvmm.virtio._generated_more
import pyvmm.virtio._generated_uapi

ROOT = Path(__file__).resolve().parents[2]
GENERATOR = ROOT / "scripts" / "generate-bindings"

MODULES = {
    "kvm": (pyvmm.kvm._generated_uapi, ["linux/kvm.h", "asm/kvm_para.h"]),
    "boot": (pyvmm.boot._generated_uapi, ["asm/bootparam.h"]),
    "virtio": (
        pyvmm.virtio._generated_uapi,
        [
            *(f"linux/virtio_{part}.h" for part in ("ids", "config", "ring", "mmio", "blk")),
            *(f"linux/virtio_{part}.h" for part in ("net", "scsi", "console", "balloon")),
            "linux/virtio_input.h",
        ],
    ),
}
# The structures that are imported when the first of them is used.
MORE = {"kvm": pyvmm.kvm._generated_more, "virtio": pyvmm.virtio._generated_more}


def fields_of(cls: Any) -> list[tuple[str, int, int]]:
    """(member as C writes it, offset, size), down to the members of nested types."""
    found = []
    anonymous = getattr(cls, "_anonymous_", ())
    for name, kind in cls._fields_:
        if name.startswith("_gap"):
            continue
        descriptor = getattr(cls, name)
        prefix = ""
        if name not in anonymous:
            c_name = name.removesuffix("_")
            found.append((c_name, descriptor.offset, descriptor.size))
            prefix = f"{c_name}."
        if issubclass(kind, ctypes.Structure | ctypes.Union):
            found += [
                (prefix + inner, descriptor.offset + offset, size)
                for inner, offset, size in fields_of(kind)
            ]
    return found


def run_c(tmp_path: Path, headers: list[str], statements: list[str]) -> list[int]:
    """The numbers that the C expressions have, each as an unsigned 64-bit value."""
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <stdio.h>\n#include <stddef.h>\n"
        + "".join(f"#include <{header}>\n" for header in headers)
        + "int main(void)\n{\n"
        + "".join(f'    printf("%llu\\n", (unsigned long long)({s}));\n' for s in statements)
        + "    return 0;\n}\n"
    )
    program = tmp_path / "layout"
    subprocess.run(["gcc", "-w", str(source), "-o", str(program)], check=True)
    output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    return [int(line) for line in output.split()]


@pytest.mark.parametrize("name", MODULES)
def test_layouts_are_the_compilers(name: str, tmp_path: Path) -> None:
    module, headers = MODULES[name]
    growing = load_generator().VIRTIO.growing.split()
    expected: list[tuple[str, int]] = []
    for struct, cls in {**vars(module), **vars(MORE.get(name, module))}.items():
        if not isinstance(cls, type) or not cls.__module__.startswith("pyvmm.") or struct[0] == "_":
            continue
        if struct not in growing:
            expected.append((f"sizeof(struct {struct})", ctypes.sizeof(cls)))
        for member, offset, size in fields_of(cls):
            expected.append((f"offsetof(struct {struct}, {member})", offset))
            if size:  # a flexible array member has no size in C
                expected.append((f"sizeof(((struct {struct} *)0)->{member})", size))
    assert len(expected) > 20
    actual = run_c(tmp_path, headers, [expression for expression, _ in expected])
    assert dict(expected) == dict(zip((e for e, _ in expected), actual, strict=True))


@pytest.mark.parametrize("name", MODULES)
def test_constants_are_the_compilers(name: str, tmp_path: Path) -> None:
    module, headers = MODULES[name]
    expected = {k: v for k, v in vars(module).items() if k.isupper() and isinstance(v, int)}
    assert len(expected) > 10
    actual = run_c(tmp_path, headers, list(expected))
    assert expected == dict(zip(expected, actual, strict=True))


def load_generator() -> ModuleType:
    loader = SourceFileLoader("generate_bindings", str(GENERATOR))
    spec = spec_from_loader("generate_bindings", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules["generate_bindings"] = module
    loader.exec_module(module)
    return module


def test_committed_files_are_what_the_generator_writes() -> None:
    result = subprocess.run([str(GENERATOR), "--check"], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_check_shows_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = load_generator()
    output = generator.BOOT.output
    path = tmp_path / output
    path.parent.mkdir(parents=True)
    committed = (ROOT / output).read_text()
    path.write_text(committed.replace("LOADED_HIGH = 0x1", "LOADED_HIGH = 0x2"))
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    monkeypatch.setattr(generator, "generate_all", lambda: generator.generate(generator.BOOT))
    monkeypatch.setattr(sys, "argv", ["generate-bindings", "--check"])
    before = path.read_text()
    assert generator.main() == 1
    assert "-LOADED_HIGH = 0x2\n+LOADED_HIGH = 0x1\n" in capsys.readouterr().out
    assert path.read_text() == before


def test_a_name_the_headers_lack_is_an_error(tmp_path: Path) -> None:
    generator = load_generator()
    with pytest.raises(SystemExit, match="no struct kvm_flux_capacitor"):
        generator.generate(
            generator.Bindings("x.py", ("linux/kvm.h",), (), "kvm_regs kvm_flux_capacitor")
        )


@pytest.mark.parametrize("name", MORE)
def test_the_other_structures_are_found_in_the_first_module(name: str) -> None:
    module, _ = MODULES[name]
    for struct, cls in vars(MORE[name]).items():
        if isinstance(cls, type) and cls.__module__ == MORE[name].__name__:
            assert getattr(module, struct) is cls
    with pytest.raises(AttributeError, match="has no flux_capacitor"):
        _ = module.flux_capacitor
