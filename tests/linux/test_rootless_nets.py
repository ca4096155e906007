"""Guests on networks that need no root."""

from __future__ import annotations

from support.linux_guest import boot_tiny

import pyvmm

MIB = 1 << 20


def test_two_guests_on_a_switch() -> None:
    with pyvmm.Switch() as switch:
        guests = [boot_tiny(nets=[f"switch={switch.path}"]) for _ in range(2)]
        for number, guest in enumerate(guests, 1):
            guest.check(f"ip addr add 10.9.8.{number}/24 dev eth0\nip link set eth0 up")
        one, two = guests
        assert " 0% packet loss" in one.check("ping -c 3 10.9.8.2")
        sent = one.check(f"head -c {16 * MIB} /dev/urandom >/tmp/data; md5sum /tmp/data")
        # An input without end: at its end nc would end the connection both ways.
        mark = two.start("mkfifo /tmp/open; exec 3<>/tmp/open; nc -l -p 5000 <&3 | md5sum")
        one.check("sleep 1; nc 10.9.8.2 5000 </tmp/data", timeout=200)
        got = two.finish(mark)
        assert got.output.split()[0] == sent.split()[0]
        assert switch.counters["ports"] == 2
        assert switch.counters["malformed"] == 0
        for guest in guests:
            assert guest.poweroff().status == 0
            guest.vm.close()
