"""Small pictures of a few inputs, read the way the job reads them: the same limits, and decoded in a process that may die of it."""

from __future__ import annotations

import base64
import contextlib
import io
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from batch_inference import manifest
from batch_inference.config import JobConfig
from batch_inference.errors import BatchInferenceError
from batch_inference.prefixes import Prefixes
from batch_inference.preparation import Preparation
from batch_inference.storage import Store
from batch_inference.transform import Transform

SIDE = 160
_QUALITIES = (78, 60, 40)
# As a data URI; noise at full quality would be four times as much.
_MOST_BYTES = 12_000
# An image that is slow to come is not worth waiting for.
_TIMEOUT_S = 10.0
_DECODE_TIMEOUT_S = 10.0
LATE = "not read: there was no time left"


@dataclass(frozen=True)
class Thumbnail:
    """A picture, or why there is none.

    Attributes:
        uri: The input's URI.
        data: A ``data:`` URI of a square JPEG, "" where there is none.
        reason: Why there is none.
    """

    uri: str
    data: str = ""
    reason: str = ""


def thumbnails(
    store: Store, config: JobConfig, wanted: Iterable[tuple[int, int]], *, read: bool = True, deadline: float
) -> dict[tuple[int, int], Thumbnail]:
    """Reads inputs and makes them small.

    Args:
        store: The output folder, which has the manifest.
        config: The job's: limits, credentials' rules, and where inputs may lie.
        wanted: Shard and row of each.
        read: Whether images are read; else only their URIs are looked up.
        deadline: What has not come by this moment (of ``time.monotonic``) gets a reason instead.
    """
    places = sorted(set(wanted))
    uris: dict[tuple[int, int], str] = {}
    members: list[pa.Table] = []
    out: dict[tuple[int, int], Thumbnail] = {}
    known: list[tuple[int, int]] = []
    for shard in sorted({shard for shard, _ in places}):
        rows = [row for s, row in places if s == shard]
        try:
            if time.monotonic() > deadline:
                raise TimeoutError(LATE)
            table, inside = manifest.read_places(store, shard)
            table = table.take(rows)
        except (OSError, ValueError, KeyError, IndexError, pa.ArrowException, BatchInferenceError) as exc:
            reason = LATE if isinstance(exc, TimeoutError) else "the manifest can't be read"
            out |= {(shard, row): Thumbnail("", reason=reason) for row in rows}
            continue
        uris |= dict(zip([(shard, row) for row in rows], table["uri"].to_pylist(), strict=True))
        known += [(shard, row) for row in rows]
        if inside is not None:
            members.append(inside.take(rows))
    if not read:
        return out | {place: Thumbnail(uri, reason="no image was read") for place, uri in uris.items()}
    inside = pa.concat_tables(members) if members and sum(t.num_rows for t in members) == len(known) else None
    pictures = _pictures(config, [uris[place] for place in known], inside, deadline)
    return out | {
        place: Thumbnail(uris[place], **{"data" if good else "reason": text})
        for place, (good, text) in zip(known, pictures, strict=True)
    }


def _pictures(config: JobConfig, uris: list[str], members: pa.Table | None, deadline: float) -> list[tuple[bool, str]]:
    """For each URI whether there is a picture; and the picture, or why there is none."""
    found = [(False, LATE)] * len(uris)
    patience = min(_TIMEOUT_S, config.storage.timeout_s)
    storage = config.storage.model_copy(
        update={"timeout_s": patience, "retry_timeout_s": patience, "max_retries": min(1, config.storage.max_retries)}
    )
    limits = config.preprocess.model_copy(
        update={
            "decode_timeout_s": min(_DECODE_TIMEOUT_S, config.preprocess.decode_timeout_s),
            "gpu_jpeg": False,
            "exact": False,
        }
    )
    transform = Transform(SIDE, SIDE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic")
    # A table for each picture, so that the deadline is looked at between them.
    preparation = Preparation(storage, limits, transform, 1, Prefixes.of(config.input), hang_s=_DECODE_TIMEOUT_S)
    if not uris or time.monotonic() > deadline:
        return found
    with contextlib.closing(preparation.rows(0, uris, members, careful=True)) as tables:  # type: ignore[type-var]
        for table in tables:
            for row, pixels, kind, message in zip(
                *(table[name].to_pylist() for name in ("row", "pixels", "error_type", "message")), strict=True
            ):
                found[row] = (False, f"{kind}: {message}") if pixels is None else (True, picture(pixels, SIDE))
            if time.monotonic() > deadline:
                break
    return found


def picture(pixels: bytes, side: int) -> str:
    """A square of RGB pixels as a ``data:`` URI of a JPEG of some kilobytes."""
    image = Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(side, side, 3))
    data = b""
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        data = buffer.getvalue()
        if len(data) <= _MOST_BYTES:
            break
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
