"""Damaged copies of good inputs: what strangers send, and what disks and networks make of files."""

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
    """One to eight changes, of kinds that differ in how much of the structure they leave."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        rng.choice(_KINDS)(out, others, rng)
    return bytes(out[: 4 * len(data) + 4096])


def _place(out: bytearray, rng: random.Random) -> int:
    # Headers are where the lengths are: half of all changes fall on the first kilobyte.
    return rng.randrange(min(len(out), 1024) if rng.random() < 0.5 else len(out)) if out else 0


def _flip(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    if out:
        out[_place(out, rng)] ^= 1 << rng.randrange(8)


def _byte(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    if out:
        out[_place(out, rng)] = rng.randrange(256)


def _number(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    value, place = rng.choice(_NUMBERS), _place(out, rng)
    out[place : place + len(value)] = value


def _cut(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    del out[_place(out, rng) :]


def _remove(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    place = _place(out, rng)
    del out[place : place + rng.randrange(1, 64)]


def _repeat(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    place = _place(out, rng)
    out[place:place] = out[place : place + rng.randrange(1, 64)] * rng.randrange(1, 5)


def _insert(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    place = _place(out, rng)
    out[place:place] = rng.randbytes(rng.randrange(1, 32))


def _splice(out: bytearray, others: list[bytes], rng: random.Random) -> None:
    other = rng.choice(others)
    if other:
        start = rng.randrange(len(other))
        place = _place(out, rng)
        out[place : place + rng.randrange(1, 256)] = other[start : start + rng.randrange(1, 256)]


_KINDS = (_flip, _flip, _byte, _byte, _number, _number, _cut, _remove, _repeat, _insert, _splice)
