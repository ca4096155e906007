"""What the way from exec to the guest's first instruction does not import."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pyvmm._core

ROOT = Path(__file__).parents[2]

# Milliseconds each, in a start of about 25; the last three are for what few guests need.
SLOW = (
    "argparse array dataclasses enum importlib inspect logging pathlib re shutil signal subprocess "
    "tempfile typing elftools pyvmm.kvm._generated_more pyvmm.virtio._generated_more"
)

# -S, as the finder of an editable install imports half the library by itself.
PROGRAM = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {sysconfig.get_path("platlib")!r}]
import pyvmm
pyvmm.__path__.append({str(Path(pyvmm._core.__file__).parent)!r})
from pyvmm.cli import main
status = main(sys.argv[1:])
slow = {SLOW.split()!r}
print([name for name in slow if name in sys.modules], status)
"""


def test_start_imports_nothing_slow(monitor_guest: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, "run", "--accel", "kvm"]
    command += ["--kernel", str(monitor_guest), "--disk", str(disk), "--memory", "64M"]
    for start in ("the first, which unpacks the kernel", "every other"):
        result = subprocess.run(
            command,
            input="p",
            capture_output=True,
            text=True,
            timeout=60,
            env={"XDG_CACHE_HOME": str(tmp_path)},
        )
        assert (result.returncode, result.stderr) == (0, ""), start
    assert result.stdout == "> [] 0\n"
