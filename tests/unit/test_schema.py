"""The machinery of settings: every way in reads the same, and every error says what to write."""

from __future__ import annotations

import tomllib
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import UsageError
from pyvmm.schema import (
    MIB,
    Boolean,
    Choice,
    Integer,
    Many,
    One,
    Path,
    Record,
    Seconds,
    Size,
    Source,
    Text,
    Texts,
    any_of,
    format_size,
    quote_toml,
    setting,
    suggest,
)


class Wheel(Record, implied="make"):
    make: str = setting(Path(), help="a maker")
    spokes: int = setting(Integer(4, 64, power_of_two=True), default=32, help="spokes")
    tubeless: bool = setting(Boolean(), default=False, help="without a tube")

    def to_text(self) -> str:
        make = self.make.replace(",", ",,")
        return f"make={make},spokes={self.spokes},tubeless={'on' if self.tubeless else 'off'}"


class Bicycle(Record):
    name: str = setting(Text(longest=5), default="", help="a name")
    load: int = setting(Size(least=MIB, most=1 << 40, multiple=MIB), default=MIB, help="a load")
    brake: str = setting(Choice("rim", "disc", "drum"), default="rim", help="a brake")
    delay: float | None = setting(Seconds(), default=None, help="a delay")
    spare: Wheel | None = setting(One(Wheel), default=None, help="a spare wheel")
    wheels: tuple[Wheel, ...] = setting(Many(Wheel), default=(), flag="--wheel", help="a wheel")


class Bell(Record):
    rings: tuple[str, ...] = setting(Texts(), default=(), help="what it says")


def wheel(text: str) -> Wheel:
    return Wheel.from_text(text, Source("--wheel"))


def bicycle(**values: object) -> Bicycle:
    return Bicycle.from_table(values, Source())


def test_defaults() -> None:
    it = Bicycle()
    assert (it.name, it.load, it.brake, it.delay) == ("", MIB, "rim", None)
    assert it.wheels == ()


def test_all_ways_in_agree() -> None:
    expected = Wheel(make="acme", spokes=16, tubeless=True)
    assert wheel("acme,spokes=16,tubeless=on") == expected
    assert wheel("tubeless=on,spokes=16,make=acme") == expected
    table = tomllib.loads('make = "acme"\nspokes = 16\ntubeless = true')
    assert Wheel.from_table(table, Source("x.toml")) == expected
    assert bicycle(wheels=("acme,spokes=16,tubeless=on",)).wheels == (expected,)
    assert bicycle(wheels=[expected]).wheels == (expected,)
    assert bicycle(wheels=[table]).wheels == (expected,)


def test_a_key_that_may_be_repeated() -> None:
    bell = Bell.from_text("rings=ding,rings=dong,,dong", Source("--bell"))
    assert bell == Bell(rings=["ding", "dong,dong"]) == Bell(rings=("ding", "dong,dong"))
    assert tomllib.loads(bell.to_toml()) == {"rings": ["ding", "dong,dong"]}
    assert Bell.from_table(tomllib.loads(bell.to_toml()), Source("x.toml")) == bell
    for wrong, message in {
        "ding": "rings=ding is not a list: put it in brackets",
        (1,): "rings=(1,) is not text",
    }.items():
        with pytest.raises(UsageError) as error:
            Bell(rings=wrong)
        assert str(error.value) == message


def test_path_objects_are_never_parsed() -> None:
    assert bicycle(wheels=[PurePosixPath("a,b=c")]).wheels == (Wheel(make="a,b=c"),)


@pytest.mark.parametrize(
    ("text", "make"),
    [
        ("a", "a"),
        ("a,,b", "a,b"),
        ("a,,,spokes=8", "a,"),
        ("/x=y", "/x=y"),
        ("make=x=y", "x=y"),
        ("make=a,,b", "a,b"),
    ],
)
def test_commas_and_equals_signs_in_a_path(text: str, make: str) -> None:
    assert wheel(text).make == make


@given(
    make=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
    spokes=st.sampled_from([4, 8, 16, 32, 64]),
    tubeless=st.booleans(),
)
def test_text_round_trip(make: str, spokes: int, tubeless: bool) -> None:
    original = Wheel(make=make, spokes=spokes, tubeless=tubeless)
    assert wheel(original.to_text()) == original


@given(st.text(st.characters(codec="utf-8")))
def test_toml_strings_round_trip(text: str) -> None:
    assert tomllib.loads(f"x = {quote_toml(text)}") == {"x": text}


def test_what_is_not_unicode_cannot_be_toml() -> None:
    with pytest.raises(UsageError) as error:
        quote_toml("\udcff")
    assert str(error.value) == r"'\udcff' is not UTF-8 and cannot be written as TOML"


def test_toml_round_trip() -> None:
    original = bicycle(
        name="a b",
        load="3M",
        delay=1.5,
        spare="/acme",
        wheels=["/x", {"make": '/"quoted"\n', "spokes": 8}],
    )
    table = tomllib.loads(original.to_toml())
    assert table["load"] == "3M"
    assert Bicycle.from_table(table, Source("x.toml")) == original


WHEEL_KEYS = "(known keys: make, spokes, tubeless)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,spoke=8", f"unknown key 'spoke' in --wheel, did you mean 'spokes'? {WHEEL_KEYS}"),
        ("a,colour=8", f"unknown key 'colour' in --wheel {WHEEL_KEYS}"),
        (
            "x=y",
            "unknown key 'x' in --wheel; write make=x=y if that is the make " + WHEEL_KEYS,
        ),
        ("a,tubeless", "--wheel: tubeless has no value: write tubeless=on|off"),
        ("a,b", "--wheel: 'b' is not KEY=VALUE (a comma inside a value is written twice)"),
        ("a,", "--wheel: '' is not KEY=VALUE (a comma inside a value is written twice)"),
        ("a,spokes=8,spokes=8", "--wheel: spokes is given twice"),
        ("a,make=b", "--wheel: make is given twice"),
        ("spokes=8", "--wheel: make is missing: give a maker"),
        ("", "--wheel: make= is empty: give the path of a file"),
        ("a,tubeless=yes", "--wheel: tubeless=yes is neither on nor off"),
        (
            "a,spokes=two",
            "--wheel: spokes=two is not a whole number: give a power of two from 4 to 64",
        ),
        (
            "a,spokes=-8",
            "--wheel: spokes=-8 is not a whole number: give a power of two from 4 to 64",
        ),
        ("a,spokes=2", "--wheel: spokes=2 is out of range: give a power of two from 4 to 64"),
        (
            "a,spokes=" + "9" * 5000,
            f"--wheel: spokes={'9' * 5000} is out of range: give a power of two from 4 to 64",
        ),
        ("a,spokes=6", "--wheel: spokes=6 is not a power of two: give a power of two from 4 to 64"),
    ],
)
def test_text_errors(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        wheel(text)
    assert str(error.value) == message


BICYCLE_KEYS = "(known keys: name, load, brake, delay, spare, wheels)"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nmae": "x"}, f"unknown key 'nmae' in Bicycle, did you mean 'name'? {BICYCLE_KEYS}"),
        ({"name": 5}, "name=5 is not text"),
        ({"name": "a\0b"}, "name=a\0b contains a NUL character"),
        ({"name": "abcdef"}, "name=abcdef is too long: at most 5 characters"),
        ({"name": "é"}, "name=é is not plain ASCII text"),
        ({"brake": "none"}, "brake=none is not one of the choices: give rim, disc or drum"),
        ({"brake": 1}, "brake=1 is not one of the choices: give rim, disc or drum"),
        ({"load": "x"}, "load=x is not a size: give a number with K, M, G or T, such as 512M"),
        (
            {"load": "1.5G"},
            "load=1.5G is not a size: give a number with K, M, G or T, such as 512M",
        ),
        ({"load": "1MM"}, "load=1MM is not a size: give a number with K, M, G or T, such as 512M"),
        ({"load": True}, "load=True is not a size: give a number of bytes or text such as '512M'"),
        ({"load": 2.0}, "load=2.0 is not a size: give a number of bytes or text such as '512M'"),
        ({"load": "512K"}, "load=512K is too small: the least is 1M"),
        ({"load": "512"}, "load=512 is too small: the least is 1M (for mebibytes write 512M)"),
        ({"load": 0}, "load=0 is too small: the least is 1M"),
        ({"load": "2T"}, "load=2T is too large: the most is 1T"),
        ({"load": "9" * 5000}, f"load={'9' * 5000} is too large: the most is 1T"),
        ({"load": 2500000}, "load=2500000 is not a multiple of 1M: give 2M or 3M"),
        ({"delay": "soon"}, "delay=soon is not a number of seconds"),
        ({"delay": True}, "delay=True is not a number of seconds"),
        ({"delay": 0}, "delay=0 is out of range: give more than 0 seconds"),
        ({"delay": "nan"}, "delay=nan is out of range: give more than 0 seconds"),
        ({"spare": 5}, "spare=5 is not KEY=VALUE,..."),
        ({"spare": {"make": 5}}, "spare: make=5 is not a path"),
        ({"spare": {"make": b"x"}}, "spare: make=b'x' is not a path"),
        ({"spare": {"make": "a\0"}}, "spare: make=a\0 contains a NUL character"),
        ({"spare": {"make": "a", "tubeless": 1}}, "spare: tubeless=1 is neither on nor off"),
        ({"spare": {"spokes": 8}}, "spare: make is missing: give a maker"),
        ({"wheels": "acme"}, "wheels=acme is not a list: put it in brackets"),
        (
            {"wheels": ["a", {"make": "b", "spokes": 1.5}]},
            "wheels[1]: spokes=1.5 is not a whole number: give a power of two from 4 to 64",
        ),
        (
            {"wheels": ["a,spoke=1"]},
            f"unknown key 'spoke' in wheels[0], did you mean 'spokes'? {WHEEL_KEYS}",
        ),
    ],
)
def test_python_errors(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as error:
        bicycle(**values)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("source", "place", "wheel_place"),
    [
        (Source("vm.toml"), "vm.toml: load", "vm.toml: wheels[0]"),
        (Source(flags=True), "--load", "--wheel"),
        (Source(), "load", "wheels[0]"),
    ],
)
def test_errors_call_a_setting_what_its_writer_called_it(
    source: Source, place: str, wheel_place: str
) -> None:
    with pytest.raises(UsageError) as error:
        Bicycle.read({"load": "1"}, source)
    assert str(error.value) == f"{place}=1 is too small: the least is 1M (for mebibytes write 1M)"
    with pytest.raises(UsageError) as error:
        Bicycle.read({"wheels": ["a,tubeless=1"]}, source)
    assert str(error.value) == f"{wheel_place}: tubeless=1 is neither on nor off"


def test_paths_in_a_file_start_at_its_folder() -> None:
    source = Source("etc/vm.toml", folder="etc")
    it = Bicycle.from_table({"spare": "a", "wheels": ["/b", {"make": "../c"}]}, source)
    assert it.spare == Wheel(make="etc/a")
    assert [each.make for each in it.wheels] == ["/b", "etc/../c"]


@given(st.integers(0, 1 << 50))
def test_sizes_round_trip(size: int) -> None:
    read = Size(least=0, most=1 << 50, multiple=1).read
    assert read(format_size(size), Source()) == size
    assert read(size, Source()) == size


@pytest.mark.parametrize("text", ["512M", "512m", "512MiB", "524288K", "536870912", "512MIB"])
def test_spellings_of_a_size(text: str) -> None:
    assert Size(least=0, most=1 << 40, multiple=1).read(text, Source()) == 512 * MIB


def test_records_are_frozen() -> None:
    record = Wheel(make="a")
    with pytest.raises(AttributeError) as error:
        record.spokes = 8  # type: ignore[misc]
    assert str(error.value) == "Wheel is frozen: use replace(spokes=...)"
    assert record.replace(spokes=8) == Wheel(make="a", spokes=8)
    assert record.spokes == 32
    with pytest.raises(UsageError):
        record.replace(spokes=7)


def test_equal_records_have_equal_hashes_whatever_the_order_of_words() -> None:
    one, other = Wheel(make="a", spokes=8), Wheel(spokes=8, make="a")
    assert one == other
    assert hash(one) == hash(other)
    assert repr(one) == repr(other) == "Wheel(make='a', spokes=8, tubeless=False)"
    assert one != Wheel(make="b", spokes=8)
    assert one != "a"


def test_words() -> None:
    assert any_of(["a"]) == "a"
    assert any_of(["a", "b"]) == "a or b"
    assert any_of(["a", "b", "c"]) == "a, b or c"
    assert suggest("memry", ["memory", "cpus"]) == ", did you mean 'memory'?"
    assert suggest("xyz", ["memory", "cpus"]) == ""
