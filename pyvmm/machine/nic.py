"""What the network devices of a machine are connected to."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.backends.net import NetPort
    from pyvmm.config import NetConfig


def open_port(config: NetConfig) -> NetPort:
    """The backend that `config` asks for. UsageError when it cannot be had."""
    match config.kind:
        case "user":
            from pyvmm.backends.forward import Forward
            from pyvmm.backends.user_net import DEFAULT_MTU, UserNet

            return UserNet(
                network=config.net,
                mtu=config.mtu or DEFAULT_MTU,
                hostname=config.hostname,
                restrict=config.restrict,
                loopback=config.loopback,
                ipv6=config.ipv6,
                forwards=[Forward.from_text(text) for text in config.hostfwd],
            )
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
