"""``pyvmm run``: from options to a running guest, on /dev/kvm or in the emulated machine."""

from __future__ import annotations

import gc
import os
import sys

from pyvmm.config import CHARDEVS, NETS, VmConfig, from_command_line
from pyvmm.errors import EXIT_STATUSES, ExitStatus, NoKvmError, UsageError
from pyvmm.schema import MIB, Boolean, Many, One, Record, quote_toml

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from typing import Any, Self

    from pyvmm.machine.events import Event
    from pyvmm.machine.vm import VM

# What the kernel and the programs of the emulated machine need beside the guest's memory.
_NESTED_OWN_MEMORY = 512 * MIB

_GROUPS = ("boot", "machine", "storage", "network", "console", "lifecycle")

_EXAMPLES = """\
examples:
  pyvmm run --image tiny
      a small Linux, built on first use; 'pyvmm images' lists what there is
  pyvmm run --kernel bzImage --initrd initrd.img --disk disk.img
      your kernel; the root file system is the first disk (root=/dev/vda rw)
  pyvmm run --kernel host --disk disk.img,readonly=on --append 'quiet root=/dev/vda1'
      a partition of a disk, which stays as it is
  pyvmm run --kernel vmlinux --memory 1G --cpus 4 --console stdio --timeout 60 --no-reboot
      for a CI job: four CPUs, output through virtio, at most a minute
  pyvmm run --image debian --memory 4G --balloon reporting=on
      memory that the guest frees goes back to the host
  pyvmm run --image debian --net tap=tap0,queues=2 --cpus 2
      a network interface on the host's tap0, which 'ip tuntap add dev tap0 mode tap user $USER
      multi_queue' makes
  pyvmm run --image debian --cdrom media.iso --scsi-device iscsi://storage/iqn.2026-11.example:a/1
      a CD drive, and a disk of an iSCSI target
  pyvmm run --image debian --port org.qemu.guest_agent.0,unix=agent.sock
      a socket on which the guest's agent answers
  pyvmm run --kernel bzImage --disk disk.img --dry-run > vm.toml
  pyvmm run --config vm.toml --memory 2G
      the same machine from a file, with more memory
"""

_NOTES = """\
kernel parameters:
  pyvmm gives console=ttyS0 (and hvc0, if --console is connected; the one on stdio is last
  and so /dev/console) and, where there is a disk, root=/dev/vda rw (ro for readonly=on).
  --append comes after them; a console= or root= in it replaces pyvmm's. --dry-run shows the whole.

configuration file:
  TOML, with the names of the options as keys ('disks' for --disk: strings as here, or tables
  [[disks]]). Relative paths start at the file's folder. An option replaces the file's value;
  --disk replaces all of the file's disks.
"""


class Option:
    """An option of the command line: what argparse and :func:`quick_arguments` make of it.

    It sets ``name`` to the text of its value, to a list of them if ``repeated``, or, if it is a
    ``switch``, to True; ``off_flag`` is the switch that sets it to False.
    """

    def __init__(
        self,
        flag: str,
        name: str,
        help: str,
        *,
        group: str,
        metavar: str = "",
        switch: bool = False,
        off_flag: str = "",
        repeated: bool = False,
    ) -> None:
        self.flag = flag
        self.name = name
        self.help = help
        self.group = group
        self.metavar = metavar
        self.switch = switch
        self.off_flag = off_flag
        self.repeated = repeated


# Options that are about this run, not about the machine.
_RUN_OPTIONS = (
    Option(
        "--image",
        "image",
        "boot an image of 'pyvmm images' (built on first use): its kernel, its initrd and its "
        "disk, with snapshot=on",
        group="boot",
        metavar="NAME",
    ),
    Option("--config", "config", "read settings from a TOML file", group="boot", metavar="FILE"),
    Option(
        "--dry-run",
        "dry_run",
        "check everything, print the whole configuration as TOML and start nothing",
        group="lifecycle",
        switch=True,
    ),
)


def _options() -> list[Option]:
    options = []
    for name, each in VmConfig.settings.items():
        switch = isinstance(each.kind, Boolean)
        option = Option(
            each.flag,
            name,
            each.help,
            group=each.group,
            metavar=each.kind.metavar,
            switch=switch,
            off_flag=each.flag.replace("--", "--no-", 1) if switch else "",
            repeated=isinstance(each.kind, Many),
        )
        options.append(option)
    return [*options, *_RUN_OPTIONS]


class Arguments:
    """What argparse calls a namespace; only options that were given are in it."""

    argv: list[str]

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)


def quick_arguments(argv: Sequence[str]) -> Arguments | None:
    """The arguments, if every word is of a plain form; else None, for argparse to decide.

    argparse would cost 13 ms of the about 20 between exec and the guest's first instruction: 4 to
    be imported beside the modules of a running VM, the rest to be told of all the options.
    """
    options = {option.flag: (option, True) for option in _options()}
    options |= {each.off_flag: (each, False) for each, _ in [*options.values()] if each.off_flag}
    values: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        option, on = options.get(flag, (None, False))
        if option is None:
            return None
        if option.switch:
            if equals:
                return None
            values[option.name] = on
            continue
        if not equals:
            value = next(words, "-")
            if value.startswith("-"):
                return None
        if option.repeated:
            values.setdefault(option.name, []).append(value)
        else:
            values[option.name] = value
    return Arguments(values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from argparse import SUPPRESS, BooleanOptionalAction

    parser.usage = "pyvmm run (--kernel K | --image NAME | --config FILE) [OPTION...]"
    parser.epilog = "\n".join([_EXAMPLES, _key_tables(), _NOTES, _status_table()])
    groups = {name: parser.add_argument_group(name) for name in _GROUPS}
    for option in _options():
        arguments: dict[str, Any] = {"dest": option.name, "default": SUPPRESS}
        if option.switch:
            arguments["action"] = BooleanOptionalAction if option.off_flag else "store_true"
        else:
            arguments["action"] = "append" if option.repeated else "store"
            arguments["metavar"] = option.metavar
        help = option.help + _default(option.name)
        groups[option.group].add_argument(option.flag, help=help.replace("%", "%%"), **arguments)


def _default(name: str, record: type[Record] = VmConfig) -> str:
    each = record.settings.get(name)
    if each is None or each.required or not each.default:
        return ""
    return f" (default: {each.kind.text(each.default)})"


def _key_tables() -> str:
    lines = []
    for each in VmConfig.settings.values():
        if isinstance(each.kind, (Many, One)) and each.kind.metavar == Record.metavar:
            lines += _key_table(each.flag, each.kind.record)
    lines += ["what --net connects to:"]
    lines += [f"  {name:29} {help}" for name, help in NETS.items()]
    lines += ["", "values of --serial and --console:"]
    lines += [f"  {name:29} {help}" for name, help in CHARDEVS.items()]
    return "\n".join(lines) + "\n"


def _key_table(flag: str, record: type[Record]) -> list[str]:
    how = f" (the {record.implied} may stand first and alone; ',,' is a comma in it)"
    lines = [f"keys of {flag} {record.metavar}{how if record.implied else ''}:"]
    for key, each in record.settings.items():
        word = f"{key}={each.kind.metavar}"
        lines.append(f"  {word:29} {each.help}{_default(key, record)}")
    return [*lines, ""]


def _status_table() -> str:
    rows = "\n".join(f"  {status:<4} {meaning}" for status, meaning in EXIT_STATUSES.items())
    return f"exit status:\n{rows}"


def run(args: Arguments | argparse.Namespace) -> int:
    given = dict(vars(args))
    argv = given.pop("argv")
    dry_run = given.pop("dry_run", False)
    config_file = given.pop("config", None)
    image = given.pop("image", None)
    if image is not None:
        given = {**_image_settings(image), **given}
    config = from_command_line(given, config_file)
    if dry_run:
        return _show(config)
    reason = _why_nested(config)
    if reason is None:
        return _run_here(config)
    _check_files(config)
    _check_devices(config, reason)
    if config.accel == "auto":
        print(
            f"pyvmm: {reason}; continuing in an emulated AMD-V machine (slow)",
            file=sys.stderr,
        )
    for remark in _remarks_on_nested(config):
        print(f"pyvmm: {remark}", file=sys.stderr)
    return _run_nested(config, argv)


def _image_settings(name: str) -> dict[str, object]:
    from pyvmm.images import path

    image = path(name)
    # All share the images of the cache.
    disks = [] if image.disk is None else [{"path": image.disk, "snapshot": True}]
    return {"kernel": image.kernel, "initrd": image.initrd, "disks": disks}


def _show(config: VmConfig) -> int:
    """``--dry-run``: everything that can be found out without a guest, and the configuration."""
    from pyvmm.boot.linux import resolve_kernel

    config = config.replace(kernel=resolve_kernel(config.kernel))
    _check_files(config)
    reason = _why_nested(config)
    if reason is None and config.accel == "kvm":
        reason_against_kvm = _why_not_kvm()
        if reason_against_kvm is not None:
            raise NoKvmError(reason_against_kvm)
    place = "/dev/kvm" if reason is None else f"an emulated AMD-V machine (slow): {reason}"
    print("# pyvmm run --config FILE starts this machine.")
    print(f"# It would run on {place}.")
    print(f"# Kernel parameters: {quote_toml(config.command_line())}")
    print(config.to_toml(), end="")
    return ExitStatus.OK


def _check_files(config: VmConfig) -> None:
    """Opens the files as the machine will, for an error now instead of after a slow start."""
    from pyvmm.backends.scsi.cdrom import open_medium
    from pyvmm.backends.storage import open_disk
    from pyvmm.boot.files import open_file
    from pyvmm.boot.linux import resolve_kernel

    os.close(open_file(resolve_kernel(config.kernel), "kernel"))
    if config.initrd is not None:
        os.close(open_file(config.initrd, "initrd"))
    for disk in config.disks:
        open_disk(**disk.backend()).close()
    for cdrom in config.cdroms:
        if cdrom.path != "none":
            open_medium(cdrom.path).close()


def _check_devices(config: VmConfig, reason: str) -> None:
    """Refuses what an emulated machine cannot have; `reason` is why it has to be one."""
    if config.scsi_devices:
        from pyvmm.backends.scsi.iscsi import hidden

        raise UsageError(
            f"--scsi-device={hidden(config.scsi_devices[0].path)} needs a /dev/kvm that runs Linux "
            f"({reason}): an emulated machine sees neither the devices of this one nor its network"
        )


def _remarks_on_nested(config: VmConfig) -> list[str]:
    """What does not reach out of an emulated machine."""
    remarks = []
    kinds = {config.serial.kind, config.console.kind, *(port.kind for port in config.ports)}
    if kinds & {"unix", "connect", "pty"}:
        remarks.append(
            "sockets and pseudo-terminals of consoles and ports are inside the emulated machine, "
            "where this host's programs do not reach them; 'pyvmm nested -- sh' is a shell in "
            "which 'pyvmm run' and such programs meet"
        )
    if any(net.hostfwd for net in config.nets):
        remarks.append(
            "the ports of hostfwd are those of the emulated machine, which this host's programs do "
            "not reach; 'pyvmm nested -- sh' is a shell in which 'pyvmm run' and they meet"
        )
    return remarks


def _why_not_kvm() -> str | None:
    from pyvmm.kvm.probe import probe

    result = probe()
    return None if result.can_run_linux else result.reason


def _why_nested(config: VmConfig) -> str | None:
    """Why the machine has to run in an emulated one; None if it runs on /dev/kvm."""
    if config.accel == "kvm":
        return None
    from pyvmm.nested import why_not

    reason = "--accel=nested asks for it" if config.accel == "nested" else _why_not_kvm()
    if reason is not None and config.accel == "auto":
        no_nested = why_not()
        if no_nested is not None:
            raise NoKvmError(f"{reason}; and no emulated machine can stand in: {no_nested}")
    return reason


def _run_nested(config: VmConfig, argv: Sequence[str]) -> int:
    """The same command in the emulated machine, with the KVM that is there."""
    from pyvmm.nested import NestedConfig, run_nested

    machine = NestedConfig()
    needed = config.memory + _NESTED_OWN_MEMORY
    if machine.memory < needed:
        machine = machine.replace(memory=needed)
    # As `python -m pyvmm` would, without the time that runpy takes in an emulated machine.
    main = "from pyvmm.cli import entry; entry()"
    words = ["run", *argv, "--accel=kvm"]
    control = None
    if config.qmp is not None:
        from pyvmm.nested.forward import INSIDE, MAIN

        main = MAIN
        words.append(f"--qmp=unix:{INSIDE}")
        control = config.qmp.removeprefix("unix:")
    return run_nested([sys.executable, "-P", "-c", main, *words], machine, control=control)


def _run_here(config: VmConfig) -> int:
    from pyvmm.machine.vm import VM

    with _Signals() as signals, VM(config) as vm:
        vm.on_event(lambda event: _tell_user(vm, event))
        vm.start()
        gc.enable()
        signals.connect(vm.stop, lambda: _go_on(vm))
        for remark in vm.remarks:
            print(f"pyvmm: {remark}", file=sys.stderr)
        outcome = vm.wait(config.timeout)
    outcome.check()
    return outcome.status


def _go_on(vm: VM) -> None:
    vm.resume()
    vm.wake()


def _tell_user(vm: VM, event: Event) -> None:
    if event.name == "SUSPEND":
        print(f"\npyvmm: the guest sleeps; to wake it: kill -CONT {os.getpid()}", file=sys.stderr)
    if event.name == "BLOCK_IO_ERROR":
        print(
            f"\npyvmm: the guest is stopped by {vm.stopped_by}; put that right, "
            f"then let it try again: kill -CONT {os.getpid()}",
            file=sys.stderr,
        )
    elif event.name == "BALLOON_STALLED" and vm.balloon is not None:
        from pyvmm.machine.balloon import describe_stall

        print(f"\npyvmm: {describe_stall(vm.balloon)}", file=sys.stderr)


class _Signals:
    """Has SIGINT and SIGTERM end the guest from outside of whatever they interrupt, and SIGCONT
    resume or wake it.

    So a terminal is always restored and nothing stops halfway; a second signal changes nothing.
    """

    def __enter__(self) -> Self:
        # Not `signal`, which wraps it in enumerations: 3 ms.
        import _signal  # type: ignore[import-not-found]

        self._status = 0
        self._stop: Callable[[int], None] | None = None
        self._resume: Callable[[], None] | None = None
        self._continue = _signal.SIGCONT
        self._restore = _signal.signal
        self._before = {
            number: _signal.signal(number, self._handle)
            for number in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGCONT)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            self._restore(number, handler)

    def connect(self, stop: Callable[[int], None], resume: Callable[[], None]) -> None:
        """Calls ``stop`` with the exit status once there is a signal, or if there was one."""
        self._stop, self._resume = stop, resume
        if self._status:
            stop(self._status)

    def _handle(self, number: int, frame: object) -> None:
        from threading import Thread

        if number == self._continue:
            if self._resume is not None:
                Thread(target=self._resume, daemon=True).start()
            return
        self._status = 128 + number
        if self._stop is not None:
            # `stop` waits on locks that the interrupted code may hold.
            Thread(target=self._stop, args=(self._status,), daemon=True).start()
