"""Thumbnails of a few inputs, read as the job reads them: with its limits, and decoded in a process that may die."""

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

from batch_inference.config import JobConfig
from batch_inference.errors import BatchInferenceError
from batch_inference.images.transform import Transform
from batch_inference.inputs.allowlist import Allowlist
from batch_inference.output import manifest
from batch_inference.pipeline.prepare import Preparation
from batch_inference.storage.store import Store

#: Height and width of a thumbnail in pixels.
SIDE = 160
_QUALITIES = (78, 60, 40)
# Maximum size of a JPEG in bytes; noise at the highest quality would take four times as much.
_MAX_BYTES = 12_000
# Seconds per image; a report does not wait for slow images.
_FETCH_TIMEOUT_S = 10.0
_DECODE_TIMEOUT_S = 10.0
NO_TIME_LEFT = "not read: no time was left"


@dataclass(frozen=True)
class Thumbnail:
    """A thumbnail, or the reason why there is none.

    Attributes:
        uri: URI of the input.
        data: A ``data:`` URI of a square JPEG; "" if there is none.
        reason: Reason why there is none.
    """

    uri: str
    data: str = ""
    reason: str = ""


def read_thumbnails(
    store: Store, config: JobConfig, wanted: Iterable[tuple[int, int]], *, read: bool = True, deadline: float
) -> dict[tuple[int, int], Thumbnail]:
    """Read inputs and return thumbnails of them by shard and row.

    Args:
        store: The output folder, which has the manifest.
        config: Configuration of the job, with its limits and the allowed locations of inputs.
        wanted: Shard and row of each input.
        read: Whether images are read; otherwise only their URIs are looked up.
        deadline: Time of ``time.monotonic`` after which images get a reason instead of a thumbnail.
    """
    keys = sorted(set(wanted))
    uris: dict[tuple[int, int], str] = {}
    members: list[pa.Table] = []
    thumbnails: dict[tuple[int, int], Thumbnail] = {}
    readable: list[tuple[int, int]] = []
    for shard in sorted({shard for shard, _ in keys}):
        rows = [row for key_shard, row in keys if key_shard == shard]
        try:
            if time.monotonic() > deadline:
                raise TimeoutError(NO_TIME_LEFT)
            table, locations = manifest.read_with_locations(store, shard)
            table = table.take(rows)
        except (OSError, ValueError, KeyError, IndexError, pa.ArrowException, BatchInferenceError) as exc:
            reason = NO_TIME_LEFT if isinstance(exc, TimeoutError) else "the manifest cannot be read"
            thumbnails |= {(shard, row): Thumbnail("", reason=reason) for row in rows}
            continue
        uris |= dict(zip([(shard, row) for row in rows], table["uri"].to_pylist(), strict=True))
        readable += [(shard, row) for row in rows]
        if locations is not None:
            members.append(locations.take(rows))
    if not read:
        return thumbnails | {key: Thumbnail(uri, reason="no image was read") for key, uri in uris.items()}
    complete = bool(members) and sum(table.num_rows for table in members) == len(readable)
    pictures = _read_pictures(
        config, [uris[key] for key in readable], pa.concat_tables(members) if complete else None, deadline
    )
    return thumbnails | {
        key: Thumbnail(uris[key], **{"data" if is_picture else "reason": text})
        for key, (is_picture, text) in zip(readable, pictures, strict=True)
    }


def _read_pictures(
    config: JobConfig, uris: list[str], locations: pa.Table | None, deadline: float
) -> list[tuple[bool, str]]:
    """Return (True, ``data:`` URI) or (False, reason) for each URI."""
    pictures = [(False, NO_TIME_LEFT)] * len(uris)
    timeout_s = min(_FETCH_TIMEOUT_S, config.storage.timeout_s)
    storage = config.storage.model_copy(
        update={"timeout_s": timeout_s, "retry_timeout_s": timeout_s, "max_retries": min(1, config.storage.max_retries)}
    )
    limits = config.preprocess.model_copy(
        update={
            "decode_timeout_s": min(_DECODE_TIMEOUT_S, config.preprocess.decode_timeout_s),
            "decoder": "fast",
        }
    )
    transform = Transform(SIDE, SIDE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic")
    # One table per image, so that the deadline is checked after each.
    preparation = Preparation(
        storage, limits, transform, 1, Allowlist.from_config(config.input), hang_s=_DECODE_TIMEOUT_S
    )
    if not uris or time.monotonic() > deadline:
        return pictures
    with contextlib.closing(preparation.rows(0, uris, locations, careful=True)) as tables:  # type: ignore[type-var]
        for table in tables:
            for row, pixels, error_type, message in zip(
                *(table[name].to_pylist() for name in ("row", "pixels", "error_type", "message")), strict=True
            ):
                pictures[row] = (
                    (False, f"{error_type}: {message}") if pixels is None else (True, encode_jpeg(pixels, SIDE))
                )
            if time.monotonic() > deadline:
                break
    return pictures


def encode_jpeg(pixels: bytes, side: int) -> str:
    """Return a JPEG of at most some kilobytes as a ``data:`` URI.

    Args:
        pixels: RGB bytes of a square image, uint8 (side, side, 3).
        side: Height and width in pixels.
    """
    image = Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(side, side, 3))
    data = b""
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        data = buffer.getvalue()
        if len(data) <= _MAX_BYTES:
            break
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
