"""What the network devices of a machine are connected to."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.backends.net import NetPort
    from pyvmm.config import NetConfig


def open_port(config: NetConfig) -> NetPort:
    """The backend that `config` asks for. UsageError when it cannot be had."""
    match config.kind:
        case "tap":
            from pyvmm.backends.tap import open_tap

            assert config.tap is not None
            return open_tap(
                config.tap,
                queues=config.queues,
                mtu=config.mtu,
                offloads=config.offloads,
                vhost=config.vhost,
            )
    raise AssertionError(f"a network of kind {config.kind!r}")
