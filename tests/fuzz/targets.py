"""What is fed with damaged inputs, and what it may raise: a failed row or a message for a person, and nothing else."""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from batch_inference import manifest
from batch_inference.config import InputConfig, JobConfig, PreprocessConfig, StorageConfig, load_config
from batch_inference.containers import contents
from batch_inference.decoding import decode, pixels_of
from batch_inference.errors import RowFailure, UserError
from batch_inference.fetcher import Fetcher
from batch_inference.isolation import Helper
from batch_inference.manifest import apart
from batch_inference.members import runs
from batch_inference.prefixes import Prefixes
from batch_inference.runs import fetched
from batch_inference.storage import canonical_uri, display, split_bucket
from batch_inference.terminal import plain
from batch_inference.transform import Transform
from tests.unit.containers import parquet, tar

FAST, EXACT = (
    PreprocessConfig(max_pixels=10**7, decode_timeout_s=5, decode_memory_mib=512),
    PreprocessConfig(exact=True, max_pixels=10**7),
)
ACCEPT = FAST.model_copy(update={"damaged": "accept"})


@dataclass(frozen=True)
class Target:
    """Something that reads a stranger's bytes.

    Attributes:
        name: As it stands in the table.
        seeds: Good inputs.
        read: Reads one; raises nothing but what is expected.
    """

    name: str
    seeds: list[bytes]
    read: Callable[[bytes], None]


def photo(width: int = 320, height: int = 240) -> Image.Image:
    """Smooth and noisy parts, in colour."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=2)
    return Image.fromarray(np.clip(base + rng.normal(0, 12, base.shape), 0, 255).astype(np.uint8))


def encoded(kind: str, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    photo().convert(mode).save(out, kind, **options)
    return out.getvalue()


def _images() -> dict[str, list[bytes]]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "JPEG": [
            encoded("JPEG"), encoded("JPEG", progressive=True, quality=95), encoded("JPEG", "L"), encoded("JPEG", "CMYK"),
            encoded("JPEG", exif=exif.tobytes(), subsampling=0),
        ],
        "PNG": [encoded("PNG"), encoded("PNG", "P"), encoded("PNG", "RGBA"), encoded("PNG", "L")],
        "WebP": [encoded("WEBP"), encoded("WEBP", lossless=True), encoded("WEBP", "RGBA")],
        "GIF, BMP, TIFF": [
            encoded("GIF"), encoded("BMP"), encoded("TIFF"), encoded("TIFF", compression="tiff_lzw"),
            encoded("TIFF", compression="tiff_adobe_deflate"),
        ],
    }  # fmt: skip


def _decode(data: bytes) -> None:
    for config in (FAST, EXACT, ACCEPT):
        try:
            pixels = decode(data, config, Transform())
        except RowFailure:
            continue
        assert pixels.shape == (224, 224, 3)
    try:
        pixels_of(data, FAST, None)
    except RowFailure:
        return


def _manifest(ending: str) -> Callable[[bytes], None]:
    section = InputConfig(manifest=f"s3://bucket/list.{ending}", allowed_prefixes=("s3://bucket/",))
    prefixes = Prefixes.of(section)
    assert prefixes is not None

    def read(data: bytes) -> None:
        uri = f"s3://bucket/list.{ending}"
        try:
            table = manifest._checked_columns(manifest._parse_manifest(uri, data, "uri"), section, uri)
            for value in manifest._canonical_column(table["uri"], "s3://bucket").to_pylist():
                prefixes.refusal(value)
                plain(value)
            for _, part in manifest.cut(table.slice(0, 1000), 100):
                manifest.encode_shard(part)
        except UserError as exc:
            assert exc.message and exc.remedy

    return read


def _archive(ending: str) -> Callable[[bytes], None]:
    """Lists what is in a file, and reads it: a Parquet file's pages as they are after a task has died of them."""
    folder = tempfile.mkdtemp(prefix="fuzz-")
    section = InputConfig(uris=(folder,), bytes_column="image" if ending == "parquet" else None)
    fetcher = Fetcher(StorageConfig())

    def read(data: bytes) -> None:
        file = Path(folder, f"{os.getpid()}.{ending}")
        file.write_bytes(data)
        try:
            (found,) = contents([f"file://{file}"], section, StorageConfig())
        except UserError as exc:
            assert exc.message and exc.remedy
            return
        uris, where = apart(found.table.slice(0, 100))
        unpack = _helper(os.getpid()).unpack
        read = list(fetched(runs(uris["uri"].to_pylist(), where, fetcher, 10**6, None, unpack), 1))
        assert sorted(one.row for one in read) == list(range(uris.num_rows))
        assert all(one.error is None or (one.error.message and not one.data) for one in read)

    return read


@functools.lru_cache
def _helper(process: int) -> Helper:
    """One for each process that inputs are read in; it ends with that."""
    return Helper(FAST, None)


def _sparse() -> bytes:
    """An archive with sparse members of both formats that GNU tar writes."""
    old, new = tarfile.TarInfo("old.jpg"), tarfile.TarInfo("new.jpg")
    old.type = tarfile.GNUTYPE_SPARSE
    new.size = 1024
    new.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "new.jpg",
        "GNU.sparse.realsize": "9",
    }
    map_of_parts = b"1\n0\n3\n".ljust(512, b"\0") + b"abc".ljust(512, b"\0")
    return old.tobuf(tarfile.GNU_FORMAT) + new.tobuf(tarfile.PAX_FORMAT) + map_of_parts + tar({"a.jpg": b"x"})


def _kinds(images: list[bytes]) -> list[bytes]:
    """Parquet files whose images are in columns of other kinds than bytes."""
    column = pa.array(images, pa.binary())
    lists = pa.array([list(image[:200]) for image in images], pa.list_(pa.uint8()))
    fixed = pa.array([image[:200] for image in images], pa.binary(200))
    files = []
    for values in (
        column.dictionary_encode(),
        lists,
        fixed,
        pa.array([images]),
        pa.array([base64.b64encode(i).decode() for i in images]),
    ):
        out = io.BytesIO()
        pq.write_table(pa.table({"image": values}), out)
        files.append(out.getvalue())
    return files


def _config(data: bytes) -> None:
    file = Path(tempfile.gettempdir(), f"fuzz-{os.getpid()}.yaml")
    file.write_bytes(data)
    try:
        load_config(str(file))
    except UserError as exc:
        assert exc.message and exc.remedy


def _setting(data: bytes) -> None:
    try:
        load_config(None, None, [data.decode("utf-8", "surrogateescape")])
    except UserError as exc:
        assert exc.message and exc.remedy


def _uri(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    try:
        uri = canonical_uri(text)
    except UserError as exc:
        plain(exc.message)
        return
    assert canonical_uri(uri) == uri
    split_bucket(uri)
    plain(display(uri))


def targets() -> list[Target]:
    """All of them."""
    uris = [f"s3://bucket/photos/{i}.jpg" for i in range(50)]
    table = pa.table({"uri": uris, "id": list(range(50)), "caption": [f"a photo, {i}" for i in range(50)]})
    files: dict[str, bytes] = {}
    for compression in ("zstd", "none"):
        out = io.BytesIO()
        pq.write_table(table, out, compression=compression)
        files[compression] = out.getvalue()
    lines = table.to_pylist()
    text = "uri,id,caption\n" + "".join(f'{row["uri"]},{row["id"]},"{row["caption"]}"\n' for row in lines)
    jpegs = {f"{i}.jpg": encoded("JPEG") for i in range(3)}
    images = list(jpegs.values())
    full = yaml.safe_dump(JobConfig().model_dump(mode="json"))
    return [
        *[Target(name, seeds, _decode) for name, seeds in _images().items()],
        Target("manifest.csv", [text.encode(), text.replace("\n", "\r\n").encode("utf-8-sig")], _manifest("csv")),
        Target("manifest.jsonl", ["\n".join(map(json.dumps, lines)).encode()], _manifest("jsonl")),
        Target("manifest.txt", ["\n".join(uris).encode()], _manifest("txt")),
        Target("manifest.parquet", list(files.values()), _manifest("parquet")),
        Target("tar", [
            tar(jpegs), tar(jpegs, "pax"), tar({"a" * 150 + ".jpg": b"x"}), tar({"a.jpg": b"x"}) + tar({"b.jpg": b"y"}, "pax"), _sparse(),
        ], _archive("tar")),
        Target("Parquet of images", [
            parquet(images), parquet(images, struct=False), parquet([None, *images]), *_kinds(images),
        ], _archive("parquet")),
        Target("configuration", [full.encode(), b"input: {uris: [s3://b/a/]}\noutput: {uri: s3://b/o}\n"], _config),
        Target("--set", [b"inference.actors=2", b"input.uris=[a, b]", b"model.transform={crop: 10}"], _setting),
        Target("URI", [b"s3://bucket/a/b.jpg", b"file:///data/1.jpg", b"photos/1.jpg", b"az://c@account/x", b"s3://b/a.tar#1.jpg"], _uri),
    ]  # fmt: skip
