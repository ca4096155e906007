"""The ring in C does what the reference in Python does, with good drivers and with hostile ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.fake_driver import FakeDriver, ring_config
from support.native_ring import NativeVirtqueue

from pyvmm.virtio.reference import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
    Buffer,
    Chain,
    GuestMemory,
    ReferenceVirtqueue,
    RingConfig,
    need_event,
)

Ring = NativeVirtqueue | ReferenceVirtqueue
T = TypeVar("T")
STATE = ("broken", "next_avail", "next_used", "published_used", "chains", "malformed")

# Two small regions with a hole: rings and buffers are in the first, edges are near everything.
REGIONS = {0x1000: 0x1800, 0x3000: 0x210}
BUFFERS = Buffer(0x2000, 0x400)
RINGS, TABLE, DATA = 0x1000, 0x2400, 0x2600
N, W, I = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT  # noqa: E741


def make_memory() -> GuestMemory:
    return GuestMemory({gpa: bytearray(size) for gpa, size in REGIONS.items()})


def edges() -> st.SearchStrategy[int]:
    ends = [0, 1 << 64, *REGIONS, *(gpa + size for gpa, size in REGIONS.items()), *BUFFERS]
    near = st.builds(
        lambda end, off: (end + off) % (1 << 64), st.sampled_from(ends), st.integers(-32, 32)
    )
    return near | st.integers(0, 0x3400)


lengths = st.sampled_from([0, 1, 16, 32, 48, 0x200, 0x1000, 0xFFFF_FFFF]) | st.integers(0, 0x2000)
u16 = st.integers(0, 0xFFFF)
flag_bits = st.sampled_from([0, N, W, N | W, I, I | N, I | W]) | st.integers(0, 15)


class Twin:
    """A driver, and a device twice: in C, and in Python on a copy of the guest's memory."""

    def __init__(self, config: RingConfig, start: int = 0) -> None:
        self.native_memory, self.reference_memory = make_memory(), make_memory()
        self.driver = FakeDriver(self.native_memory, config, BUFFERS, start)
        self.native = NativeVirtqueue(self.native_memory, config)
        self.reference = ReferenceVirtqueue(self.reference_memory, config)
        self.native.start_at(start)
        for field in ("avail_idx", "next_avail", "next_used", "published_used"):
            setattr(self.reference, field, start)
        used = config.used_gpa - 0x1000
        self.used_ring = slice(used, used + 6 + 8 * config.size)

    def both(self, step: Callable[[Ring], T]) -> T:
        """What `step` comes to, on which the two agree to the last byte of guest memory."""
        before = self.contents(self.native_memory)
        for gpa, ram in self.native_memory.regions.items():
            self.reference_memory.regions[gpa][:] = ram
        result = step(self.native)
        assert result == step(self.reference)
        after = self.contents(self.native_memory)
        assert after == self.contents(self.reference_memory)
        for field in STATE:
            assert getattr(self.native, field) == getattr(self.reference, field), field
        del before[0][self.used_ring], after[0][self.used_ring]
        assert after == before, "only the used ring is the device's to write"
        return result

    @staticmethod
    def contents(memory: GuestMemory) -> list[bytearray]:
        return [bytearray(ram) for ram in memory.regions.values()]


class HostileChain(NamedTuple):
    """Descriptors (address, length, flags, next) of the queue's table and of an indirect one."""

    direct: list[tuple[int, int, int, int]]
    table: list[tuple[int, int, int, int]]


@st.composite
def hostile_chains(draw: st.DrawFn) -> HostileChain:
    """A chain as it should be, with up to two of its fields changed to anything."""
    ends_in_table = draw(st.booleans())
    in_direct = draw(st.integers(0 if ends_in_table else 1, 4))
    in_table = draw(st.integers(1, 10)) if ends_in_table else 0
    writable_from = draw(st.integers(0, in_direct + in_table))
    links = [
        [BUFFERS.gpa, 1 + place, N | (W if place >= writable_from else 0), place + 1]
        for place in range(in_direct + in_table)
    ]
    links[-1][2] &= ~N
    for place, link in enumerate(links[in_direct:]):
        link[3] = place + 1
    if ends_in_table:
        links.insert(in_direct, [TABLE, DESC_SIZE * in_table, I, 0])
    values = (edges(), lengths, flag_bits, st.integers(0, 12) | u16)
    for field in draw(st.lists(st.integers(0, 3), max_size=2)):
        links[draw(st.integers(0, len(links) - 1))][field] = draw(values[field])
    tuples = [(link[0], link[1], link[2], link[3]) for link in links]
    direct = in_direct + ends_in_table
    return HostileChain(tuples[:direct], tuples[direct:])


@given(
    chain=hostile_chains(),
    size=st.sampled_from([1, 4, 8, 8]),
    indirect=st.sampled_from([True, True, True, False]),
)
@settings(max_examples=600, deadline=None)
def test_hostile_chains_come_out_alike(chain: HostileChain, size: int, indirect: bool) -> None:
    twin = Twin(ring_config(size, RINGS, indirect=indirect))
    for index, link in enumerate(chain.direct[:size]):
        twin.driver.write_desc(index, *link)
    for index, link in enumerate(chain.table):
        twin.driver.write_desc((TABLE - twin.driver.config.desc_gpa) // DESC_SIZE + index, *link)
    twin.driver.write_avail_idx(1)
    twin.both(lambda ring: ring.pop())
    twin.both(lambda ring: ring.publish())


class Twins(RuleBasedStateMachine):
    """A good driver, a hostile guest, and a device, all on one queue in any order."""

    @initialize(
        size=st.sampled_from([1, 2, 4, 8]),
        event_idx=st.booleans(),
        indirect=st.booleans(),
        start=st.sampled_from([0, 65533]),
        overlap=st.sampled_from(["", "", "", "used on desc", "used on avail", "avail on desc"]),
    )
    def start(self, size: int, event_idx: bool, indirect: bool, start: int, overlap: str) -> None:
        config = ring_config(size, RINGS, event_idx=event_idx, indirect=indirect)
        if overlap == "used on desc":
            config = config._replace(used_gpa=config.desc_gpa)
        elif overlap == "used on avail":
            config = config._replace(used_gpa=(config.avail_gpa + 3) & ~3)
        elif overlap == "avail on desc":
            config = config._replace(avail_gpa=config.desc_gpa)
        self.size = size
        self.twin = Twin(config, start)
        self.both, self.driver, self.native = self.twin.both, self.twin.driver, self.twin.native
        self.good = not overlap
        self.popped: list[Chain] = []

    @precondition(lambda self: self.native.broken)
    @rule()
    def reset(self) -> None:
        self.twin = Twin(self.driver.config)
        self.both, self.driver, self.native = self.twin.both, self.twin.driver, self.twin.native
        self.good = True
        self.popped = []

    # The device.

    @rule()
    def pop(self) -> None:
        chain = self.both(lambda ring: ring.pop())
        if chain is not None:
            self.popped.append(chain)
            assert len(self.popped) <= self.size

    @precondition(lambda self: self.popped)
    @rule(which=st.integers(0, 7), share=st.sampled_from([0, 0.5, 1]))
    def push(self, which: int, share: float) -> None:
        chain = self.popped.pop(which % len(self.popped))
        written = int(share * sum(buffer.length for buffer in chain.writable))
        self.both(lambda ring: ring.push(chain.head, written))

    @rule(event=st.integers(-3, 5) | st.none())
    def publish(self, event: int | None) -> None:
        """`event`: where, seen from what was published last, the driver wants an interrupt."""
        if event is not None:
            self.driver.write_used_event((self.native.published_used + event) % 65536)
        self.both(lambda ring: ring.publish())

    @rule()
    def disable_notify(self) -> None:
        self.both(lambda ring: ring.disable_notify())

    @rule()
    def enable_notify(self) -> None:
        self.both(lambda ring: ring.enable_notify())

    # A good driver, until somebody else wrote to the rings.

    @rule(
        readable=st.lists(st.integers(0, 40), max_size=4),
        writable=st.lists(st.integers(0, 40), max_size=4),
        indirect=st.booleans(),
        publish=st.booleans(),
    )
    def offer(
        self, readable: list[int], writable: list[int], indirect: bool, publish: bool
    ) -> None:
        if not readable and not writable:
            return
        try:
            self.driver.add([b"r" * length for length in readable], writable, indirect)
        except BufferError:
            return
        if publish:
            self.driver.publish()

    @precondition(lambda self: self.good)
    @rule()
    def collect(self) -> None:
        self.driver.collect()

    @rule()
    def want_interrupts(self) -> None:
        self.driver.enable_interrupts()

    @rule()
    def want_no_interrupts(self) -> None:
        self.driver.disable_interrupts()

    # A hostile guest.

    @rule(index=st.integers(0, 7), addr=edges(), length=lengths, flags=flag_bits, following=u16)
    def scribble_desc(self, index: int, addr: int, length: int, flags: int, following: int) -> None:
        self.good = False
        if following > 0xFF00:
            following %= self.size
        self.driver.write_desc(index % self.size, addr, length, flags, following)

    @rule(slot=st.integers(0, 7), head=st.integers(0, 9) | u16)
    def scribble_avail(self, slot: int, head: int) -> None:
        self.good = False
        self.driver.write_avail(slot, head)

    @rule(ahead=st.integers(0, 4) | st.integers(-2, 10) | u16)
    def scribble_avail_idx(self, ahead: int) -> None:
        self.good = False
        self.driver.write_avail_idx((self.native.next_avail + ahead) % 65536)

    @rule(which=st.integers(0, 7))
    def serve_all(self, which: int) -> None:
        """As a device does it; without this most runs would end with a full queue."""
        while (chain := self.both(lambda ring: ring.pop())) is not None:
            self.popped.append(chain)
            assert len(self.popped) <= self.size
        while self.popped:
            self.push(which, 1)
        self.publish(None)

    @rule(offset=st.integers(0, REGIONS[0x1000] - 1), data=st.binary(min_size=1, max_size=24))
    def scribble(self, offset: int, data: bytes) -> None:
        self.good = False
        self.driver.write(0x1000 + offset, data[: REGIONS[0x1000] - offset])

    def teardown(self) -> None:
        """Whatever the rings hold, the device comes to an end of it."""
        for _ in range(self.size + 1):
            if self.both(lambda ring: ring.pop()) is None:
                break
        else:
            pytest.fail("more chains than the queue is long")


TestTwins = Twins.TestCase
TestTwins.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@given(
    desc_gpa=edges(),
    avail_gpa=edges(),
    used_gpa=edges(),
    size=st.sampled_from([0, 1, 2, 3, 8, 16, 24, 64, 256, 32768, 32769, 65535]),
)
def test_both_accept_the_same_configurations(
    desc_gpa: int, avail_gpa: int, used_gpa: int, size: int
) -> None:
    config = RingConfig(desc_gpa, avail_gpa, used_gpa, size)

    def accepted(ring: type[NativeVirtqueue] | type[ReferenceVirtqueue]) -> bool:
        try:
            ring(make_memory(), config)
        except ValueError:
            return False
        return True

    assert accepted(NativeVirtqueue) == accepted(ReferenceVirtqueue)


# What each kind of traffic comes to, said once for both.


@pytest.fixture(params=[NativeVirtqueue, ReferenceVirtqueue], ids=["C", "reference"])
def make_pair(request: pytest.FixtureRequest) -> Callable[..., tuple[FakeDriver, Ring]]:
    def pair(size: int = 8, **options: bool) -> tuple[FakeDriver, Ring]:
        memory = make_memory()
        config = ring_config(size, RINGS, **options)
        return FakeDriver(memory, config, BUFFERS), request.param(memory, config)

    return pair


MakePair = Callable[..., tuple[FakeDriver, Ring]]


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_a_chain_there_and_back(make_pair: MakePair, indirect: bool) -> None:
    driver, ring = make_pair(indirect=True)
    head = driver.submit([b"request", b"data"], [5, 3], indirect)
    chain = ring.pop()
    assert chain is not None and chain.head == head
    assert [driver.read(*buffer) for buffer in chain.readable] == [b"request", b"data"]
    assert [buffer.length for buffer in chain.writable] == [5, 3]
    driver.write(chain.writable[0].gpa, b"reply")
    driver.write(chain.writable[1].gpa, b"!")
    ring.push(head, 6)
    assert driver.collect() == []
    assert ring.publish()
    assert [used[1:] for used in driver.collect()] == [(6, b"reply!")]
    assert ring.pop() is None and not ring.broken


def test_the_used_index_is_published_once_for_a_batch(make_pair: MakePair) -> None:
    driver, ring = make_pair()
    heads = [driver.submit([b"x"]) for _ in range(4)]
    chains = [ring.pop() for _ in heads]
    for chain in reversed(chains):
        assert chain is not None
        ring.push(chain.head, 0)
    assert driver.collect() == []
    assert ring.publish()
    assert not ring.publish()
    assert [used.head for used in driver.collect()] == heads[::-1]


def test_indices_wrap(make_pair: MakePair) -> None:
    driver, ring = make_pair(4, event_idx=True)
    for _ in range(66_000):
        driver.submit([b"x"])
        chain = ring.pop()
        assert chain is not None
        ring.push(chain.head, 0)
        ring.publish()
        assert len(driver.collect()) == 1
    assert ring.chains == 66_000 and not ring.broken


MALFORMED = {
    "outside guest memory": [(0x9000, 1, 0, 0)],
    "across the end of a region": [(0x27FF, 2, 0, 0)],
    "across a hole": [(0x2000, 0x1100, 0, 0)],
    "address wraps": [((1 << 64) - 1, 2, 0, 0)],
    "loop of one": [(DATA, 1, N, 0)],
    "loop of two": [(DATA, 1, N, 1), (DATA, 1, N, 0)],
    "next outside the table": [(DATA, 1, N, 8)],
    "readable after writable": [(DATA, 1, W | N, 1), (DATA, 1, 0, 0)],
    "empty readable after writable": [(DATA, 1, W | N, 1), (DATA, 0, 0, 0)],
    "table with a next": [(TABLE, 16, I | N, 1), (DATA, 1, 0, 0)],
    "empty table": [(TABLE, 0, I, 0)],
    "half a descriptor": [(TABLE, 24, I, 0)],
    "table outside guest memory": [(0x27F0, 32, I, 0)],
    "table in a table": [(TABLE + 32, 16, I, 0)],
    "the queue's own table as a table": [(RINGS, 16, I, 0)],
    "loop in a table": [(TABLE + 16, 16, I, 0)],
    "next outside an indirect table": [(TABLE + 48, 16, I, 0)],
}


def fill_table(driver: FakeDriver) -> None:
    """Indirect descriptors at TABLE: a good one, a loop, a table, and one with a next."""
    links = [(DATA, 1, 0, 0), (DATA, 1, N, 0), (TABLE, 16, I, 0), (DATA, 1, N, 1)]
    for index, link in enumerate(links):
        driver.write_desc((TABLE - driver.config.desc_gpa) // 16 + index, *link)


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_chain_fails_alone(make_pair: MakePair, kind: str) -> None:
    driver, ring = make_pair(indirect=True)
    fill_table(driver)
    heads = [driver.add([b"a", b"b"]), driver.add([b"good"])]
    for index, link in enumerate(MALFORMED[kind]):
        driver.write_desc(index, *link)
    driver.publish()
    good = ring.pop()
    assert good is not None and good.head == heads[1]
    assert (ring.malformed, ring.chains, ring.broken) == (1, 1, False)
    ring.push(good.head, 0)
    assert ring.publish()
    assert driver.collect() == [(heads[0], 0, b""), (heads[1], 0, b"")]


def test_tables_need_the_feature(make_pair: MakePair) -> None:
    driver, ring = make_pair(indirect=False)
    driver.submit([b"x"], indirect=True)
    assert ring.pop() is None
    assert ring.malformed == 1


def test_a_table_may_follow_direct_descriptors_and_its_write_flag_says_nothing(
    make_pair: MakePair,
) -> None:
    driver, ring = make_pair(indirect=True)
    fill_table(driver)
    driver.submit([b"a", b"b"])
    driver.write_desc(1, TABLE, 16, I | W, 0)
    chain = ring.pop()
    assert chain is not None
    assert [buffer.length for buffer in chain.readable] == [1, 1] and not chain.writable


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_a_chain_may_be_as_long_as_the_queue(make_pair: MakePair, indirect: bool) -> None:
    driver, ring = make_pair(8, indirect=True)
    driver.submit([b"x"] * 8, indirect=indirect)
    chain = ring.pop()
    assert chain is not None and len(chain.readable) == 8


def test_a_longer_table_is_malformed(make_pair: MakePair) -> None:
    driver, ring = make_pair(8, indirect=True)
    driver.submit([b"x"] * 9, indirect=True)
    assert ring.pop() is None and ring.malformed == 1


def test_empty_descriptors_are_left_out(make_pair: MakePair) -> None:
    driver, ring = make_pair()
    head = driver.submit([b"", b"x", b""], [0, 2, 0])
    driver.write_desc(0, 0xDEAD_0000, 0, N, 1)
    chain = ring.pop()
    assert chain is not None and chain.head == head
    assert [buffer.length for buffer in chain.readable + chain.writable] == [1, 2]


def test_a_head_outside_the_table_is_dropped(make_pair: MakePair) -> None:
    driver, ring = make_pair()
    driver.add([b"x"])
    good = driver.add([b"good"])
    driver.write_avail(0, 8)
    driver.publish()
    chain = ring.pop()
    assert chain is not None and chain.head == good
    assert ring.malformed == 1 and ring.next_used == 0


@pytest.mark.parametrize("idx", [9, 0x8000, 0xFFFF], ids=["far", "half way", "back"])
def test_an_available_index_that_cannot_be_breaks_the_ring(make_pair: MakePair, idx: int) -> None:
    driver, ring = make_pair(8)
    driver.write_avail_idx(idx)
    assert ring.enable_notify()
    assert ring.pop() is None and ring.broken
    assert not ring.enable_notify(), "a broken ring must not make the device try again"
    driver.write_avail_idx(0)
    driver.submit([b"x"])
    assert ring.pop() is None and ring.broken


def test_more_chains_than_descriptors_break_the_ring(make_pair: MakePair) -> None:
    """The same head made available while it is in flight: the count gives it away."""
    driver, ring = make_pair(4)
    head = driver.submit([b"x"])
    for slot in range(4):
        driver.write_avail(slot, head)
    driver.write_avail_idx(4)
    for _ in range(4):
        chain = ring.pop()
        assert chain is not None and chain.head == head
        ring.push(head, 0)
    driver.write_avail_idx(5)
    assert ring.pop() is None and ring.broken
    assert ring.publish(), "what was served before still goes back"


def test_interrupt_flag(make_pair: MakePair) -> None:
    driver, ring = make_pair()
    driver.disable_interrupts()
    assert not serve_one(driver, ring)
    assert driver.enable_interrupts()
    driver.collect()
    assert not driver.enable_interrupts()
    assert serve_one(driver, ring)


def test_interrupt_event_index(make_pair: MakePair) -> None:
    driver, ring = make_pair(event_idx=True)
    assert serve_one(driver, ring)
    assert not serve_one(driver, ring), "the driver has not asked again"
    driver.collect()
    driver.write_used_event(3)
    assert [serve_one(driver, ring) for _ in range(3)] == [False, True, False]


def serve_one(driver: FakeDriver, ring: Ring) -> bool:
    """Whether the driver gets an interrupt for one chain."""
    driver.submit([b"x"])
    chain = ring.pop()
    assert chain is not None
    ring.push(chain.head, 0)
    return ring.publish()


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
def test_notifications(make_pair: MakePair, event_idx: bool) -> None:
    driver, ring = make_pair(event_idx=event_idx)
    driver.add([b"first"])
    assert driver.publish(), "a fresh queue wants to be told"
    ring.disable_notify()
    assert ring.pop() is not None
    driver.add([b"second"])
    assert not driver.publish()
    assert ring.enable_notify(), "the second came while notifications were off"
    assert ring.pop() is not None
    assert not ring.enable_notify()
    driver.add([b"third"])
    assert driver.publish()


@given(old=u16, count=st.integers(0, 300), event=u16, near=st.integers(-3, 303) | st.none())
def test_need_event_means_that_the_event_was_passed(
    old: int, count: int, event: int, near: int | None
) -> None:
    if near is not None:
        event = (old + near) % 65536
    passed = [(old + step) % 65536 for step in range(count)]
    assert need_event(event, (old + count) % 65536, old) == (event in passed)
