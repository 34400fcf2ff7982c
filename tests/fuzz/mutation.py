"""Damaged copies of good inputs, as attackers send them, and as disks and networks make them."""

from __future__ import annotations

import random
import struct

# Where lengths and counts overflow.
_NUMBERS = [
    struct.pack(form, value & mask)
    for form, mask in (
        ("<B", 0xFF),
        ("<H", 0xFFFF),
        (">H", 0xFFFF),
        ("<I", 0xFFFFFFFF),
        (">I", 0xFFFFFFFF),
        ("<Q", 2**64 - 1),
    )
    for value in (0, 1, -1, 127, 128, 255, 256, 2**15 - 1, 2**15, 2**31 - 1, 2**31, 2**63 - 1)
]


def mutate(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return a copy with one to eight changes; their kinds differ in how much of the structure they leave."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        rng.choice(_KINDS)(out, others, rng)
    return bytes(out[: 4 * len(data) + 4096])


def _position(out: bytearray, rng: random.Random) -> int:
    # Headers are where the lengths are: half of all changes fall on the first kilobyte.
    return rng.randrange(min(len(out), 1024) if rng.random() < 0.5 else len(out)) if out else 0


def _flip(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    if out:
        out[_position(out, rng)] ^= 1 << rng.randrange(8)


def _byte(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    if out:
        out[_position(out, rng)] = rng.randrange(256)


def _number(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    value, position = rng.choice(_NUMBERS), _position(out, rng)
    out[position : position + len(value)] = value


def _cut(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    del out[_position(out, rng) :]


def _remove(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    position = _position(out, rng)
    del out[position : position + rng.randrange(1, 64)]


def _repeat(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    position = _position(out, rng)
    out[position:position] = out[position : position + rng.randrange(1, 64)] * rng.randrange(1, 5)


def _insert(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    position = _position(out, rng)
    out[position:position] = rng.randbytes(rng.randrange(1, 32))


def _splice(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    other = rng.choice(others)
    if other:
        start = rng.randrange(len(other))
        position = _position(out, rng)
        out[position : position + rng.randrange(1, 256)] = other[start : start + rng.randrange(1, 256)]


_KINDS = (_flip, _flip, _byte, _byte, _number, _number, _cut, _remove, _repeat, _insert, _splice)
