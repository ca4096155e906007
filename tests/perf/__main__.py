"""Runs each benchmark where it can run, and prints the table."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from perf.benchmarks import MONITORS, ROWS, Bench
from perf.guests import LINUX_KERNELS, prepare
from pyvmm import images
from pyvmm.kvm.probe import probe
from pyvmm.nested import run_nested

if TYPE_CHECKING:
    from collections.abc import Iterator

    from perf.benchmarks import Row, Samples

_ROOT = Path(__file__).parents[2]
_PROGRAM = _ROOT / "build" / "bench" / "venv" / "bin" / "pyvmm"
_MEMORY_FILES = "/dev/shm"

_BENCHMARKS = {
    "start": "from exec of the monitor to its exit, with a guest that powers off at once",
    "first-byte": "from exec of the monitor to the first byte that a micro-guest prints",
    "memory": "resident memory of the monitor beyond the guest's, after some I/O",
    "io": "reads of the guest from a disk image on a tmpfs, and what they cost in CPU time",
}
# It needs no Linux guest, and only a native machine shows milliseconds as they are.
_NATIVE_ONLY = "first-byte"


def main() -> int:
    args = _arguments()
    if args.samples:
        for result in _measure(args.benchmarks, args.rounds):
            args.samples.write_text(json.dumps(result))
        return 0

    results: Samples = {}
    failures: list[str] = []
    native = [name for name in args.benchmarks if name == _NATIVE_ONLY]
    linux = [name for name in args.benchmarks if name != _NATIVE_ONLY]
    reason = None
    if linux:
        for name in LINUX_KERNELS:
            images.path(name)  # built here if it is not there: in an emulated machine it takes long
        verdict = probe()
        reason = None if verdict.can_run_linux else verdict.reason
    for names, nested in ((native, False), (linux, reason is not None)):
        if names:
            if nested:
                samples, failed = _measure_nested(names, args.rounds)
            else:
                *_, (samples, failed) = _measure(names, args.rounds)
            results |= samples
            failures += failed

    print(_heading(args.rounds))
    if reason is not None:
        print(f"In an emulated machine, for here {reason}: {', '.join(linux)}")
    print(_table(results))
    for failure in failures:
        print(f"failed: {failure}")
    if args.json:
        args.json.write_text(json.dumps({"samples": results, "failures": failures}, indent=1))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Compares pyvmm with QEMU microvm: both on the same machine, in turns.",
        epilog="benchmarks:\n"
        + "".join(f"  {name:12}{what}\n" for name, what in _BENCHMARKS.items())
        + "\nWhat boots Linux runs in an emulated machine where KVM cannot run it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "benchmarks", nargs="*", metavar="BENCHMARK", help="what to measure (default: everything)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="runs of each monitor that count (default: 5)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    parser.add_argument("--samples", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in args.benchmarks:
        if name not in _BENCHMARKS:
            parser.error(f"there is no benchmark {name!r}: there are {', '.join(_BENCHMARKS)}")
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    args.benchmarks = args.benchmarks or list(_BENCHMARKS)
    return args


def _measure(names: list[str], rounds: int) -> Iterator[tuple[Samples, list[str]]]:
    """All samples and failures so far, after each round."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-", dir=_MEMORY_FILES) as name:
        directory = Path(name)
        guests = prepare(directory, linux=names != [_NATIVE_ONLY])
        # pyvmm's cache of unpacked kernels lies where the kernels lie, and is new.
        environment = {**os.environ, "XDG_CACHE_HOME": str(directory / "cache")}
        bench = Bench(_PROGRAM, guests, environment)
        samples: Samples = {}
        for _ in bench.run(names, rounds, samples):
            yield samples, bench.failures


def _measure_nested(names: list[str], rounds: int) -> tuple[Samples, list[str]]:
    """The same in an emulated machine, which sees this file system."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as directory:
        file = Path(directory, "samples")
        command = [sys.executable, "-m", "perf", *names, f"--rounds={rounds}"]
        os.environ["PYTHONPATH"] = str(_ROOT / "tests")
        status = run_nested([*command, "--samples", str(file)])
        if not file.exists():
            raise SystemExit(f"scripts/bench: ended with status {status} in the emulated machine")
        samples, failures = json.loads(file.read_text())
        if status != 0:
            failures.append(f"the emulated machine ended with status {status}: rounds are missing")
        return samples, failures


def _heading(rounds: int) -> str:
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True)
    version = qemu.stdout.partition("\n")[0].removeprefix("QEMU emulator version ")
    return f"pyvmm beside QEMU {version}, microvm; medians of {rounds} rounds (least-most)"


def _table(samples: Samples) -> str:
    lines = [f"{'':38}{'pyvmm':>24}{'QEMU':>24}{'ratio':>8}  {'target':14}"]
    for row in ROWS:
        ours, theirs = (samples.get(row.name, {}).get(monitor) for monitor in MONITORS)
        if ours and theirs:
            lines.append(_line(row, ours, theirs))
    return "\n".join(lines)


def _line(row: Row, ours: list[float], theirs: list[float]) -> str:
    ratio = statistics.median(ours) / statistics.median(theirs)
    verdict = ""
    if row.target is not None:
        value = statistics.median(ours) if row.absolute else ratio
        met = value >= row.target if row.more_is_better else value <= row.target
        relation = ">=" if row.more_is_better else "<="
        unit = f" {row.unit}" if row.absolute else ""
        verdict = f"{relation} {row.target:g}{unit}: {'met' if met else 'MISSED'}"
    name = f"{row.name}, {row.unit}"
    return f"{name:38}{_spread(ours):>24}{_spread(theirs):>24}{ratio:>8.2f}  {verdict}".rstrip()


def _spread(values: list[float]) -> str:
    median = statistics.median(values)
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
