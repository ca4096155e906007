"""Writes the C source of a cffi extension module: generate_cffi.py MODULE CDEF OUTPUT HEADER..."""

import sys
from pathlib import Path

import cffi


def main() -> None:
    module, cdef, output, *headers = sys.argv[1:]
    ffi = cffi.FFI()
    ffi.cdef(Path(cdef).read_text())
    ffi.set_source(module, "\n".join(f'#include "{header}"' for header in headers))
    ffi.emit_c_code(output)


main()
