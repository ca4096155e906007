"""Declared settings: one declaration of an option serves Python, TOML and the command line.

A :class:`Record` is a frozen class whose fields say what they hold, what they default to and how
the help describes them; reading, checking, messages and help follow from that::

    class DiskConfig(Record, implied="path"):
        path: str = setting(Path(), help="image file or block device")
        readonly: bool = setting(Boolean(), default=False, help="refuse writes")

    DiskConfig(path="a.img")                                    # Python
    DiskConfig.from_text("a.img,readonly=on", Source("--disk"))  # command line
    DiskConfig.from_table({"path": "a.img"}, Source("vm.toml"))  # TOML

Whatever the way in, a value is checked once, and an error calls it what its writer called it.

These are not dataclasses because of start-up time: on the development machine ``dataclasses``
(with ``inspect`` behind it) takes 15 ms of a bare interpreter's 8, ``typing`` 12, ``enum`` 4, and
all of this module below 1.
"""

from __future__ import annotations

import os

from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Any, ClassVar, Self, dataclass_transform
else:

    def dataclass_transform(**_):
        return lambda cls: cls


KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
# As many digits as are read of a number: more are out of every range, and int() limits them.
_DIGITS = 20
_UNITS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}


def format_size(size: int) -> str:
    """``536870912`` -> ``"512M"``: the form that :class:`Size` reads."""
    for letter in "TGMK":
        if size and size % _UNITS[letter] == 0:
            return f"{size // _UNITS[letter]}{letter}"
    return str(size)


def any_of(words: Iterable[str]) -> str:
    """``a, b or c``."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def suggest(word: str, known: Iterable[str]) -> str:
    """``, did you mean 'x'?`` when a known word is close to this one, else nothing."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


class Source:
    """Where settings were written: what errors call them, and where relative paths start.

    ``place`` is a file or the name of a setting that holds a record, empty for Python and the
    command line; ``flags`` says that settings are options, spelled ``--memory``; ``folder`` is
    put before relative paths.
    """

    def __init__(self, place: str = "", *, flags: bool = False, folder: str = "") -> None:
        self.place = place
        self.flags = flags
        self.folder = folder

    def name(self, setting: Setting) -> str:
        if self.flags:
            return setting.flag
        return f"{self.place}: {setting.name}" if self.place else setting.name

    def inside(self, setting: Setting) -> Source:
        """The source of the keys of a record that is the value of ``setting``."""
        return Source(self.name(setting), folder=self.folder)

    def item(self, index: int) -> Source:
        """The same for one of a list; a repeated option has no number."""
        is_option = self.place.startswith("--")
        return self if is_option else Source(f"{self.place}[{index}]", folder=self.folder)


class Kind:
    """What a setting holds. ``metavar`` stands for a value in the help."""

    metavar = ""

    def read(self, value: object, source: Source) -> object:
        """The checked value; text is parsed, a value of the right type is taken as it is.

        ``source`` is that of the value's own parts. Raises ValueError; its message goes on where
        the value ends: ``is not a size: ...``.
        """
        raise NotImplementedError

    def text(self, value: Any) -> str:
        """The value as it is written on the command line."""
        return str(value)

    def toml(self, value: Any) -> str:
        """The value as TOML; here as a string, which every kind reads."""
        return quote_toml(self.text(value))


class Text(Kind):
    def __init__(self, metavar: str = "TEXT", longest: int | None = None) -> None:
        self.metavar = metavar
        self.longest = longest

    def read(self, value: object, source: Source) -> str:
        if not isinstance(value, str):
            raise ValueError("is not text")
        if "\0" in value:
            raise ValueError("contains a NUL character")
        if self.longest is not None:
            if len(value) > self.longest:
                raise ValueError(f"is too long: at most {self.longest} characters")
            if not (value.isascii() and value.isprintable()):
                raise ValueError("is not plain ASCII text")
        return value


class Texts(Kind):
    """Any number of texts: a key that may be repeated; in Python and TOML a list."""

    def __init__(self, metavar: str = "TEXT") -> None:
        self.metavar = metavar
        self._each = Text(metavar)

    def read(self, value: object, source: Source) -> tuple[str, ...]:
        if not isinstance(value, (list, tuple)):
            raise ValueError("is not a list: put it in brackets")
        return tuple(self._each.read(each, source) for each in value)

    def toml(self, value: tuple[str, ...]) -> str:
        return f"[{', '.join(map(quote_toml, value))}]"


class Path(Kind):
    """A path as it was written, except that one in a file starts at that file's folder.

    ``words`` are values that are no paths.
    """

    def __init__(self, metavar: str = "PATH", words: tuple[str, ...] = ()) -> None:
        self.metavar = metavar
        self.words = words

    def read(self, value: object, source: Source) -> str:
        if not isinstance(value, (str, os.PathLike)):
            raise ValueError("is not a path")
        path = os.fspath(value)
        if not isinstance(path, str):
            raise ValueError("is not a path in text form")
        if not path:
            raise ValueError("is empty: give the path of a file")
        if "\0" in path:
            raise ValueError("contains a NUL character")
        return path if path in self.words else os.path.join(source.folder, path)

    def toml(self, value: str) -> str:
        return quote_toml(value if value in self.words else os.path.abspath(value))


class Boolean(Kind):
    metavar = "on|off"

    def read(self, value: object, source: Source) -> bool:
        if isinstance(value, bool):
            return value
        if value in ("on", "off"):
            return value == "on"
        raise ValueError("is neither on nor off")

    def text(self, value: bool) -> str:
        return "on" if value else "off"

    def toml(self, value: bool) -> str:
        return "true" if value else "false"


class Choice(Kind):
    def __init__(self, *words: str) -> None:
        self.words = words
        self.metavar = "|".join(words)

    def read(self, value: object, source: Source) -> str:
        if value in self.words:
            return str(value)
        raise ValueError(f"is not one of the choices: give {any_of(self.words)}")


class Integer(Kind):
    """A whole number from ``least`` to ``most``; with ``power_of_two``, only such."""

    metavar = "N"

    def __init__(self, least: int, most: int, *, power_of_two: bool = False) -> None:
        self.least = least
        self.most = most
        self.power_of_two = power_of_two

    def read(self, value: object, source: Source) -> int:
        what = "power of two" if self.power_of_two else "whole number"
        wanted = f"give a {what} from {self.least} to {self.most}"
        if isinstance(value, str) and value.isascii() and value.isdecimal():
            value = int(value[:_DIGITS])
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"is not a whole number: {wanted}")
        if not self.least <= value <= self.most:
            raise ValueError(f"is out of range: {wanted}")
        if self.power_of_two and value & (value - 1):
            raise ValueError(f"is not a power of two: {wanted}")
        return value

    def toml(self, value: int) -> str:
        return str(value)


class Size(Kind):
    """A number of bytes: an int, or text such as ``512M`` (K, M, G, T are powers of 1024)."""

    metavar = "SIZE"

    def __init__(self, least: int, most: int, multiple: int) -> None:
        self.least = least
        self.most = most
        self.multiple = multiple

    def read(self, value: object, source: Source) -> int:
        unit = ""
        if isinstance(value, str):
            bare = value.upper().removesuffix("IB")
            digits = bare.rstrip("KMGT")
            unit = bare[len(digits) :]
            if not (digits.isascii() and digits.isdecimal() and unit in _UNITS):
                raise ValueError("is not a size: give a number with K, M, G or T, such as 512M")
            value = int(digits[:_DIGITS]) * _UNITS[unit]
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("is not a size: give a number of bytes or text such as '512M'")
        if value < self.least:
            in_mib = not unit and value * MIB >= self.least
            hint = f" (for mebibytes write {value}M)" if in_mib else ""
            raise ValueError(f"is too small: the least is {format_size(self.least)}{hint}")
        if value > self.most:
            raise ValueError(f"is too large: the most is {format_size(self.most)}")
        below = value - value % self.multiple
        if value != below:
            near, above = format_size(below), format_size(below + self.multiple)
            raise ValueError(
                f"is not a multiple of {format_size(self.multiple)}: give {near} or {above}"
            )
        return value

    def text(self, value: int) -> str:
        return format_size(value)


class Seconds(Kind):
    metavar = "SECONDS"

    def read(self, value: object, source: Source) -> float:
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                value = None
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError("is not a number of seconds")
        if not 0 < value < 1e9:
            raise ValueError("is out of range: give more than 0 seconds")
        return float(value)

    def toml(self, value: float) -> str:
        return str(value)


class One(Kind):
    """A record, written in one piece of text."""

    def __init__(self, record: type[Record]) -> None:
        self.record = record
        self.metavar = record.metavar

    def read(self, value: object, source: Source) -> Record:
        return self.record.from_value(value, source)

    def text(self, value: Record) -> str:
        return value.to_text()


class Many(Kind):
    """Any number of records: the option may be repeated; in Python and TOML a list."""

    def __init__(self, record: type[Record]) -> None:
        self.record = record
        self.metavar = record.metavar

    def read(self, value: object, source: Source) -> tuple[Record, ...]:
        if not isinstance(value, (list, tuple)):
            raise ValueError("is not a list: put it in brackets")
        return tuple(self.record.from_value(each, source.item(n)) for n, each in enumerate(value))


class Setting:
    """One field of a record; made by :func:`setting`."""

    def __init__(self, kind: Kind, required: bool, default: object, help: str, **cli: str) -> None:
        self.kind = kind
        self.required = required
        self.default = default
        self.help = help
        self.group = cli.get("group", "")
        self.flag = cli.get("flag", "")
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.flag = self.flag or "--" + name.replace("_", "-")

    def read(self, value: object, source: Source) -> object:
        """The checked value. None stands for the default. Raises UsageError."""
        if value is None and not self.required:
            return self.default
        inner = source.inside(self)
        try:
            return self.kind.read(value, inner)
        except ValueError as error:
            raise UsageError(f"{inner.place}={value} {error}") from None


_REQUIRED = object()


def setting(
    kind: Kind, *, default: Any = _REQUIRED, help: str, group: str = "", flag: str = ""
) -> Any:
    """Declare a field of a record.

    ``help`` is a phrase for the key tables of ``--help``; ``group`` the heading it stands under
    and ``flag`` the option's name, if not ``--`` and the field's.
    """
    return Setting(kind, default is _REQUIRED, default, help, group=group, flag=flag)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(setting,))
class Record:
    """Base of frozen, checked settings. Construction raises UsageError for what cannot work."""

    metavar: ClassVar[str] = "KEY=VALUE,..."
    settings: ClassVar[dict[str, Setting]] = {}
    implied: ClassVar[str | None] = None

    def __init_subclass__(cls, *, implied: str | None = None) -> None:
        """``implied`` names the key whose value may be written alone at the start of the text."""
        cls.implied = implied
        cls.settings = {n: value for n, value in vars(cls).items() if isinstance(value, Setting)}
        for name in cls.settings:
            delattr(cls, name)

    def __init__(self, **values: Any) -> None:
        self._fill(values, Source())

    def _fill(self, values: Mapping[str, object], source: Source) -> None:
        given = self.read(values, source)
        for name, each in self.settings.items():
            if name not in given and each.required:
                raise UsageError(f"{source.name(each)} is missing: give {each.help}")
            self.__dict__[name] = given.get(name, each.default)
        self.complete(source)

    def complete(self, source: Source) -> None:
        """Check what concerns several fields and settle defaults that depend on others."""

    @classmethod
    def read(cls, values: Mapping[str, object], source: Source) -> dict[str, object]:
        """Check ``values`` one by one, without asking for those that are missing."""
        for key in values:
            if key not in cls.settings:
                raise cls._unknown(key, source)
        return {key: cls.settings[key].read(value, source) for key, value in values.items()}

    @classmethod
    def from_value(cls, value: object, source: Source) -> Self:
        """From whatever Python or TOML may hold: a record, a table or text."""
        if isinstance(value, cls):
            return value
        if isinstance(value, dict):
            return cls.from_table(value, source)
        if isinstance(value, str):
            return cls.from_text(value, source)
        if isinstance(value, os.PathLike) and cls.implied:
            return cls.from_table({cls.implied: value}, source)
        raise UsageError(f"{source.place}={value} is not {cls.metavar}")

    @classmethod
    def from_table(cls, values: Mapping[str, object], source: Source) -> Self:
        record = cls.__new__(cls)
        record._fill(values, source)
        return record

    @classmethod
    def from_text(cls, text: str, source: Source) -> Self:
        """From ``key=value,key=value``; ``,,`` stands for a comma in a value."""
        values: dict[str, object] = {}
        lists: dict[str, list[str]] = {}
        for key, value in cls._items(text, source):
            if key in cls.settings and isinstance(cls.settings[key].kind, Texts):
                lists.setdefault(key, []).append(value)
                continue
            if key in values:
                raise UsageError(f"{source.place}: {key} is given twice")
            values[key] = value
        return cls.from_table({**values, **lists}, source)

    @classmethod
    def _items(cls, text: str, source: Source) -> Iterator[tuple[str, str]]:
        for index, item in enumerate(text.replace(",,", "\0").split(",")):
            key, equals, value = item.replace("\0", ",").partition("=")
            if equals and key.replace("-", "_") in cls.settings:
                key = key.replace("-", "_")  # as in the names of options
            if equals and key.isidentifier():
                if index == 0 and cls.implied and key not in cls.settings:
                    written = f"write {cls.implied}={key}={value} if that is the {cls.implied}"
                    raise cls._unknown(key, source, written)
                yield key, value
            elif index == 0 and cls.implied:
                yield cls.implied, key + equals + value
            elif key in cls.settings:
                shown = cls.settings[key].kind.metavar
                raise UsageError(f"{source.place}: {key} has no value: write {key}={shown}")
            else:
                raise UsageError(
                    f"{source.place}: {key + equals + value!r} is not KEY=VALUE "
                    "(a comma inside a value is written twice)"
                )

    @classmethod
    def _unknown(cls, key: str, source: Source, hint: str = "") -> UsageError:
        message = f"unknown key {key!r} in {source.place or cls.__name__}"
        hint = suggest(key, cls.settings) or (hint and f"; {hint}")
        return UsageError(f"{message}{hint} (known keys: {', '.join(cls.settings)})")

    def to_text(self) -> str:
        """What :meth:`from_text` reads back as an equal record."""
        raise NotImplementedError

    def to_toml(self) -> str:
        """The whole record as TOML lines, lists of records as tables after them."""
        lines, tables = [], []
        for name, each in self.settings.items():
            value = getattr(self, name)
            if isinstance(each.kind, Many):
                tables += [f"\n[[{name}]]\n{item.to_toml()}" for item in value]
            elif value is not None:
                lines.append(f"{name} = {each.kind.toml(value)}\n")
        return "".join(lines + tables)

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed, checked anew."""
        return type(self)(**{**self.__dict__, **changes})

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: use replace({name}=...)")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"{type(self).__name__}({values})"


def quote_toml(text: str) -> str:
    """``text`` as a TOML basic string (TOML 1.0, "String"). Raises UsageError if it is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{text!r} is not UTF-8 and cannot be written as TOML") from None
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
