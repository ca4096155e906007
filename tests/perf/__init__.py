"""The benchmarks of scripts/bench: pyvmm beside QEMU microvm, on the same machine, in turns."""
