"""Values and damage that programs trip over, as strategies of Hypothesis."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

RAW = {
    "@digits@": "9" * 5000,
    "@minus digits@": "-" + "9" * 5000,
    "@deep list@": "[" * 50_000 + "]" * 50_000,
    "@deep object@": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "@900 deep@": "[" * 900 + "]" * 900,
    "@1e999@": "1e999",
    "@nan@": "NaN",
    "@-infinity@": "-Infinity",
    "@half a pair@": '"\\ud800"',
    "@unfinished@": '{"a": [',
    "@two values@": "1, 2",
}
"""Texts of JSON that json.dumps would not write, by what stands for them until then."""

TEXTS = [
    "",
    " ",
    "a",
    "\0",
    "a\0b",
    "\n",
    "\r\n",
    "\ud800",
    "\U0001f600",
    "\u202e",
    "\u2028",
    "a" * 300,
    "a/" * 3000,
    "x" * 20_000,
    "../..",
    "/etc/passwd",
    "/dev/zero",
    "-1",
    "1e400",
    "nan",
    "null",
    "true",
    "<|endoftext|>",
    "<|im_end|>",
    "{question}",
    "%s",
    "${oc.env:HOME}",
    "os:system",
]
NUMBERS = [0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**63), 10**18, 10**400, 0.0, -0.0, 0.5, 1e-320, 1e308, 1e17]
LEAVES: list[Any] = [None, True, False, [], {}, [[]], {"": None}, *TEXTS, *NUMBERS, *RAW]

words = st.text(st.sampled_from("abz019_-.:/ \u00e9\u6700"), max_size=12)
leaves = st.sampled_from(LEAVES) | st.sampled_from(LEAVES) | st.integers() | st.floats() | words
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=6,
)


def written(value: Any) -> bytes:
    """The value as JSON, what RAW stands for in its place."""
    text = json.dumps(value, default=str)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode("utf-8", "surrogatepass")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything inside a JSON value; long lists and objects are seen by their first entries."""
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries)[:40]:
        found += places(inner, (*path, key))
    return found


@st.composite
def changed(draw: st.DrawFn, base: Any, most: int = 3) -> Any:
    """A JSON value with up to `most` of its entries replaced, removed, renamed or joined by others."""
    value = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, most))):
        found = places(value)
        if not found:
            return draw(values)
        path = draw(st.sampled_from(found))
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "wrap", "borrow"]))
        if kind == "remove":
            del holder[path[-1]]
        elif kind == "wrap":
            holder[path[-1]] = draw(st.sampled_from([[holder[path[-1]]], {"a": holder[path[-1]]}]))
        elif kind == "add" and isinstance(holder, dict):
            holder[draw(words | st.sampled_from(TEXTS))] = draw(values)
        elif kind == "borrow":
            other = value
            for key in draw(st.sampled_from(found)):
                other = other[key] if isinstance(other, dict) and key in other else other
            holder[path[-1]] = copy.deepcopy(other)
        else:
            holder[path[-1]] = draw(values)
    return value


WORDS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1]


@st.composite
def damaged(draw: st.DrawFn, content: bytes, most: int = 4) -> bytes:
    """Bytes that were cut, overwritten, moved, doubled or lengthened in up to `most` places, often near an end."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        near = draw(st.sampled_from(["anywhere", "start", "end"]))
        room = max(1, len(data))
        reach = room if near == "anywhere" else min(room, 600)
        place = draw(st.integers(0, reach - 1))
        place = place if near != "end" else max(0, room - 1 - place)
        kind = draw(st.sampled_from(["flip", "flip", "set", "set", "cut", "remove", "insert", "word", "repeat"]))
        length = draw(st.integers(1, 64))
        if kind == "flip" and data:
            data[place % len(data)] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and data:
            data[place % len(data)] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[place:]
        elif kind == "remove":
            del data[place : place + length]
        elif kind == "insert":
            data[place:place] = draw(st.binary(max_size=32))
        elif kind == "word":
            word = draw(st.sampled_from(WORDS)).to_bytes(8, "little")[: draw(st.sampled_from([1, 2, 4, 8]))]
            data[place : place + len(word)] = word
        elif kind == "repeat":
            data[place:place] = data[place : place + length]
    return bytes(data)
