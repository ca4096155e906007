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

from perf.benchmarks import CASES, DISK_CASES, MONITORS, NET_CASES, ROWS, Bench
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
    "io": "requests of the guest to a disk on a tmpfs, and what they cost in CPU time",
    "net": "streams, round trips and datagrams between guest and host, and their CPU time",
    "balloon": "memory that the guest lends and gets back, and what that costs in CPU time",
    "serial": "streams and round trips through a virtio-serial port to a Unix socket",
    "ring": "what a chain costs pyvmm's own code, without KVM: no QEMU beside it",
}
# Cases that only --full, or their own name, runs.
_EXTRA = ("io:blk-2q", "io:scsi-2q", "net:vhost")
# It needs no Linux guest, and only a native machine shows milliseconds as they are.
_NATIVE_ONLY = "first-byte"


def main() -> int:
    args = _arguments()
    if args.samples:
        for result in _measure(args.cases, args.rounds):
            args.samples.write_text(json.dumps(result))
        return 0

    results: Samples = {}
    failures: list[str] = []
    names = [name for name in args.cases if name != "ring"]
    reason = None
    if any(name != _NATIVE_ONLY for name in names):
        for image in LINUX_KERNELS:
            images.path(image)  # built here if not there: in an emulated machine it takes long
        verdict = probe()
        reason = None if verdict.can_run_linux else verdict.reason
    native = [name for name in names if name == _NATIVE_ONLY]
    disks = [name for name in names if name != _NATIVE_ONLY and name not in NET_CASES]
    networks = [name for name in names if name in NET_CASES]
    # A network namespace of its own: no interface of the host is touched, and making some needs no
    # rights where users may have namespaces.
    for group, nested, prefix in (
        (native, False, []),
        (disks, reason is not None, []),
        (networks, reason is not None, ["unshare", "--map-root-user", "--net"]),
    ):
        if group:
            samples, failed = _measure_apart(group, args.rounds, prefix, nested=nested)
            results |= samples
            failures += failed

    if names:
        print(_heading(args.rounds))
    if reason is not None:
        print(f"In an emulated machine, for here {reason}: {', '.join(disks + networks)}")
    if names:
        print(_table(results))
    for failure in failures:
        print(f"failed: {failure}")
    if "ring" in args.cases:
        _run_ring(_ROOT / "build" / "bench" / "native")
    if args.json:
        args.json.write_text(json.dumps({"samples": results, "failures": failures}, indent=1))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Compares pyvmm with QEMU microvm: both on the same machine, in turns.",
        epilog="benchmarks:\n"
        + "".join(f"  {name:12}{what}\n" for name, what in _BENCHMARKS.items())
        + f"\nParts of them: {', '.join(DISK_CASES | NET_CASES)};\n"
        + f"without --full not {', '.join(_EXTRA)}, unless named.\n"
        + "What boots Linux runs in an emulated machine where KVM cannot run it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "benchmarks", nargs="*", metavar="BENCHMARK", help="what to measure (default: everything)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of each monitor that count (default: 3)"
    )
    parser.add_argument("--full", action="store_true", help="all parts of each benchmark")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    parser.add_argument("--samples", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        args.cases = _cases(args.benchmarks, full=args.full)
    except ValueError as error:
        parser.error(str(error))
    return args


def _cases(benchmarks: list[str], *, full: bool) -> list[str]:
    """The cases of these benchmarks, or of all if there are none, each once and in the order of the
    table. ValueError for a benchmark that there is not."""
    everything = [*CASES, "ring"]
    for name in benchmarks:
        if name not in _BENCHMARKS and name not in everything:
            known = ", ".join([*_BENCHMARKS, *DISK_CASES, *NET_CASES])
            raise ValueError(f"there is no benchmark {name!r}: there are {known}")

    def is_wanted(case: str) -> bool:
        group = case.partition(":")[0]
        return case in benchmarks or (
            (not benchmarks or group in benchmarks) and (full or case not in _EXTRA)
        )

    return [case for case in everything if is_wanted(case)]


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


def _measure_apart(
    names: list[str], rounds: int, prefix: list[str], *, nested: bool
) -> tuple[Samples, list[str]]:
    """The same in a process of its own, which ``prefix`` starts, if ``nested`` in an emulated
    machine, which sees this file system."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as directory:
        file = Path(directory, "samples")
        command = [*prefix, sys.executable, "-m", "perf", *names, f"--rounds={rounds}"]
        command += ["--samples", str(file)]
        status = run_nested(command) if nested else subprocess.run(command).returncode
        where = " in the emulated machine" if nested else ""
        if not file.exists():
            raise SystemExit(f"scripts/bench: {' '.join(prefix)} ended with status {status}{where}")
        samples, failures = json.loads(file.read_text())
        if status != 0:
            failures.append(f"status {status}{where}: rounds of {', '.join(names)} are missing")
        return samples, failures


def _run_ring(directory: Path) -> None:
    """Builds and runs the native benchmarks, each of which prints a table."""
    sources = _ROOT / "tests" / "native"
    programs = sorted(path.stem for path in sources.glob("bench_*.c"))
    configure = ["cmake", "-S", sources, "-B", directory, "-G", "Ninja"]
    build = ["cmake", "--build", directory, "--target", *programs]
    for command in (configure, build):
        subprocess.run(command, check=True, stdout=sys.stderr)
    for program in programs:
        print(flush=True)
        subprocess.run([directory / program], check=True)


def _heading(rounds: int) -> str:
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True)
    version = qemu.stdout.partition("\n")[0].removeprefix("QEMU emulator version ")
    return f"pyvmm beside QEMU {version}, microvm; medians of {rounds} rounds (least-most)"


def _table(samples: Samples) -> str:
    rows = [
        (row, ours, theirs)
        for row in ROWS
        for ours, theirs in [[samples.get(row.name, {}).get(monitor) for monitor in MONITORS]]
        if ours and theirs
    ]
    width = max((len(_title(row)) for row, _, _ in rows), default=0)
    heading = f"{'':{width}}{'pyvmm':>24}{'QEMU':>24}{'ratio':>8}  target"
    return "\n".join([heading, *(_line(*row, width) for row in rows)])


def _title(row: Row) -> str:
    return f"{row.name}, {row.unit}"


def _line(row: Row, ours: list[float], theirs: list[float], width: int = 0) -> str:
    ratio = statistics.median(ours) / statistics.median(theirs)
    verdict = ""
    if row.target is not None:
        value = statistics.median(ours) if row.absolute else ratio
        met = value >= row.target if row.more_is_better else value <= row.target
        relation = ">=" if row.more_is_better else "<="
        unit = f" {row.unit}" if row.absolute else ""
        verdict = f"{relation} {row.target:g}{unit}: {'met' if met else 'MISSED'}"
    values = f"{_spread(ours):>24}{_spread(theirs):>24}"
    return f"{_title(row):{width}}{values}{ratio:>8.2f}  {verdict}".rstrip()


def _spread(values: list[float]) -> str:
    median = statistics.median(values)
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
