"""Tar and Parquet files for tests, and a store in memory that records the ranges that are read."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_inference.config import StorageConfig
from batch_inference.errors import RowError
from batch_inference.storage.fetcher import Fetcher, Piece

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


class MemoryFetcher(Fetcher):
    """Objects in memory; records every requested range."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__(StorageConfig())
        self.objects = objects
        self.etag = "1"
        self.ranges: list[tuple[int, int]] = []

    def fetch_range(self, uri: str, start: int, end: int) -> Piece:
        data = self.objects.get(uri)
        if data is None:
            raise RowError("fetch", "NOT_FOUND", "there is no such object")
        if start < 0:
            start, end = max(0, len(data) + start), len(data)
        self.ranges.append((start, end))
        if start >= len(data):
            return Piece(b"", -1, "")
        return Piece(data[start:end], len(data), self.etag)


def tar(members: dict[str, bytes], tar_format: str = "gnu") -> bytes:
    """Return a tar file of regular members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=FORMATS[tar_format]) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def parquet(images: list[bytes | None], rows_in_group: int = 10, struct: bool = True, **options: Any) -> bytes:
    """Return a Parquet file of images as Hugging Face's datasets write it, or with plain bytes; ``number`` is the row's index."""
    values = [b if b is None else {"bytes": b, "path": f"{n}.jpg"} for n, b in enumerate(images)] if struct else images
    arrow_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    out = io.BytesIO()
    table = pa.table({"number": pa.array(range(len(images)), pa.int64()), "image": pa.array(values, arrow_type)})
    pq.write_table(table, out, row_group_size=rows_in_group, **options)
    return out.getvalue()
