"""Tar and Parquet files for tests, and a store in memory that counts what is read of them."""

from __future__ import annotations

import io
import tarfile
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batch_inference.config import StorageConfig
from batch_inference.errors import RowFailure
from batch_inference.fetcher import Fetcher, Piece

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


class MemoryFetcher(Fetcher):
    """Objects in memory; remembers every range that was asked for."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        super().__init__(StorageConfig())
        self.objects = objects
        self.etag = "1"
        self.ranges: list[tuple[int, int]] = []

    def fetch_range(self, uri: str, start: int, end: int) -> Piece:
        data = self.objects.get(uri)
        if data is None:
            raise RowFailure("fetch", "NOT_FOUND", "there is no such object")
        if start < 0:
            start, end = max(0, len(data) + start), len(data)
        self.ranges.append((start, end))
        if start >= len(data):
            return Piece(b"", -1, "")
        return Piece(data[start:end], len(data), self.etag)


def tar(members: dict[str, bytes], kind: str = "gnu") -> bytes:
    """A tar file of regular members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=FORMATS[kind]) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def parquet(images: list[bytes | None], rows_in_group: int = 10, struct: bool = True, **options: Any) -> bytes:
    """A Parquet file of images as Hugging Face's datasets write it, or with plain bytes; ``number`` is the row's."""
    values = [b if b is None else {"bytes": b, "path": f"{n}.jpg"} for n, b in enumerate(images)] if struct else images
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    out = io.BytesIO()
    table = pa.table({"number": pa.array(range(len(images)), pa.int64()), "image": pa.array(values, kind)})
    pq.write_table(table, out, row_group_size=rows_in_group, **options)
    return out.getvalue()
