"""QMP on the wire: what a stream of bytes is cut into, and what is refused."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.control import protocol
from pyvmm.control.protocol import MAX_SIZE, QmpError, Splitter, check_request, encode, parse


def split(*chunks: bytes) -> list[bytes | str]:
    """The texts in a stream that comes in those pieces, and what errors say."""
    splitter, found = Splitter(), []
    for chunk in chunks:
        splitter.feed(chunk)
        while True:
            try:
                text = splitter.next()
            except QmpError as error:
                found.append(str(error))
                continue
            if text is None:
                break
            found.append(text)
    return found


@pytest.mark.parametrize(
    ("stream", "texts"),
    [
        (b'{"a": 1}', [b'{"a": 1}']),
        (b'{"a": 1}\r\n{"b": 2}\n', [b'{"a": 1}', b'{"b": 2}']),
        (b'{"a": {"b": [1, {}]}}{}', [b'{"a": {"b": [1, {}]}}', b"{}"]),
        (b'{\n  "a": 1\n}\n', [b'{\n  "a": 1\n}']),
        (b'{"}": "\\"}"}', [b'{"}": "\\"}"}']),
        (b'"text"\n 7 \n\n', [b'"text"\n', b" 7 \n"]),
        (b'{"\\\\": 1}', [b'{"\\\\": 1}']),
        (b"stop\n{}", [b"stop\n", b"{}"]),
        (b"stop {}", [b"stop ", b"{}"]),
        (b"}{}", [b"}", b"{}"]),
        (b"{]{}", [b"{]", b"{}"]),
        (b'{"a\n{}', ["this is no JSON: a line ends inside a string", b"{}"]),
    ],
)
def test_texts_however_they_come(stream: bytes, texts: list[bytes | str]) -> None:
    assert split(stream) == texts
    assert split(*(stream[at : at + 1] for at in range(len(stream)))) == texts


def test_a_request_may_have_a_mebibyte() -> None:
    just = b'{"a": "' + b"x" * (MAX_SIZE - 9) + b'"}'
    assert len(just) == MAX_SIZE
    assert split(just) == [just]
    too_long = "a request has at most 1048576 bytes: what follows in its line is lost"
    assert split(just[:-2] + b'x"}\n{"b": 2}') == [too_long, b'{"b": 2}']
    assert split(*[b"[" * 65536] * 40, b"\n{}") == [too_long, b"{}"]
    assert split(*[b"x" * 65536] * 40, b"\n{}") == [too_long, b"{}"]


def test_what_is_dropped_takes_no_memory() -> None:
    splitter = Splitter()
    for _ in range(100):
        splitter.feed(b"{" + b"x" * 65536)
        with contextlib.suppress(QmpError):
            assert splitter.next() is None
        assert len(splitter._buffer) <= MAX_SIZE + 65537


@given(st.lists(st.binary(max_size=50) | st.sampled_from([b'{"a":1}', b'"', b"\\", b"{", b"\n"])))
def test_after_anything_a_line_end_or_two_bring_it_back(chunks: list[bytes]) -> None:
    """Whatever came: a closed string, brackets enough and an end of line, and it works again."""
    texts = split(*chunks, b'\n"\n' + b"]" * 2000 + b'\n{"b": 2}\n')
    assert texts[-1] == b'{"b": 2}'


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@given(
    st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([None, 2]),
    st.integers(1, 30),
)
def test_any_json_passes_whole(
    values: list[dict[str, object]], ascii: bool, indent: int | None, size: int
) -> None:
    stream = "".join(json.dumps(each, ensure_ascii=ascii, indent=indent) for each in values)
    data = stream.encode()
    texts = split(*(data[at : at + size] for at in range(0, len(data), size)))
    assert [parse(text) for text in texts if isinstance(text, bytes)] == values


@pytest.mark.parametrize(
    "text",
    [
        b"stop",
        b"{]",
        b"{'a': 1}",
        b"\xff\xfe{}",
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": "\\ud800"}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 100_000 + b"]" * 100_000,
        b"{}{}",
    ],
)
def test_what_is_no_json(text: bytes) -> None:
    with pytest.raises(QmpError, match=r"^this is no JSON: ") as caught:
        parse(text)
    assert caught.value.kind == "GenericError"


@given(st.binary(max_size=200))
def test_anything_is_parsed_or_refused(data: bytes) -> None:
    for text in split(data, b"\n"):
        if isinstance(text, bytes):
            try:
                request = check_request(parse(text))
            except QmpError:
                continue
            assert isinstance(request, tuple)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (7, "a request is a JSON object, such as {\"execute\": \"query-status\"}"),
        ([], "a request is a JSON object, such as {\"execute\": \"query-status\"}"),
        ({}, "'execute' is missing in the request, or is not a string"),
        ({"execute": 1}, "'execute' is missing in the request, or is not a string"),
        ({"execute": "a", "arguments": []}, "'arguments' of a request is an object"),
        (
            {"exec-oob": "a"},
            "a request has no member 'exec-oob': it has execute, arguments and id",
        ),
    ],
)  # fmt: skip
def test_what_is_no_request(request_: object, sentence: str) -> None:
    with pytest.raises(QmpError) as caught:
        check_request(request_)
    assert str(caught.value) == sentence


def test_messages_are_lines_of_ascii() -> None:
    assert encode({"a": "ä\n"}) == b'{"a": "\\u00e4\\n"}\r\n'
    assert protocol.failure(QmpError("no", "Kind")) == {"error": {"class": "Kind", "desc": "no"}}
