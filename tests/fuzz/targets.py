"""The readers that are fed with damaged inputs. They may raise a failed row or a message for a person, and nothing else."""

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

from batch_inference.config import InputConfig, JobConfig, PreprocessConfig, StorageConfig, load_config
from batch_inference.errors import RowError, UserError
from batch_inference.images.pixels import decode, pixels_of
from batch_inference.images.sandbox import SandboxedGenerator, decode_limits
from batch_inference.images.transform import Transform
from batch_inference.inputs import manifest_files, manifest_formats
from batch_inference.inputs.allowlist import Allowlist
from batch_inference.inputs.coalesce import plan_reads
from batch_inference.inputs.containers import read_contents
from batch_inference.inputs.parquet import Unpack, unpack_in_process
from batch_inference.inputs.reads import fetch_inputs
from batch_inference.output import manifest
from batch_inference.output.manifest import split_locations
from batch_inference.storage.fetcher import Fetcher
from batch_inference.storage.uris import canonical_uri, display_uri, split_bucket
from batch_inference.text import printable
from tests.support.containers import parquet, tar

FAST, EXACT = (
    PreprocessConfig(max_pixels=10**7, decode_timeout_s=5, decode_memory_mib=512),
    PreprocessConfig(decoder="exact", max_pixels=10**7),
)
ACCEPT = FAST.model_copy(update={"damaged": "accept"})


@dataclass(frozen=True)
class Target:
    """A reader of untrusted bytes.

    Attributes:
        name: Its name in the table.
        seeds: Good inputs.
        read: Reads one input; raises only if there is a finding.
    """

    name: str
    seeds: list[bytes]
    read: Callable[[bytes], None]


def photo(width: int = 320, height: int = 240) -> Image.Image:
    """Return an image with smooth and noisy parts, in color."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=2)
    return Image.fromarray(np.clip(base + rng.normal(0, 12, base.shape), 0, 255).astype(np.uint8))


def encoded(image_format: str, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    photo().convert(mode).save(out, image_format, **options)
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
        except RowError:
            continue
        assert pixels.shape == (224, 224, 3)
    try:
        pixels_of(data, FAST, None)
    except RowError:
        return


def _manifest(ending: str) -> Callable[[bytes], None]:
    config = InputConfig(manifest=f"s3://bucket/list.{ending}", allowed_prefixes=("s3://bucket/",))
    allowlist = Allowlist.from_config(config)
    assert allowlist is not None

    def read(data: bytes) -> None:
        uri = f"s3://bucket/list.{ending}"
        try:
            table = manifest_files.select_columns(manifest_formats.parse_manifest(uri, data, "uri"), config, uri)
            for value in manifest_files.canonical_column(table["uri"], "s3://bucket").to_pylist():
                allowlist.refusal(value)
                printable(value)
            for _, part in manifest.cut_shards(table.slice(0, 1000), 100):
                manifest.encode_shard(part)
        except UserError as exc:
            assert exc.message and exc.remedy

    return read


def _archive(ending: str) -> Callable[[bytes], None]:
    """Return a reader that lists a file and reads its members, a Parquet file's pages in the sandbox."""
    folder = tempfile.mkdtemp(prefix="fuzz-")
    config = InputConfig(uris=(folder,), image_column="image" if ending == "parquet" else None)
    fetcher = Fetcher(StorageConfig())

    def read(data: bytes) -> None:
        file = Path(folder, f"{os.getpid()}.{ending}")
        file.write_bytes(data)
        try:
            (contents,) = read_contents([f"file://{file}"], config, StorageConfig())
        except UserError as exc:
            assert exc.message and exc.remedy
            return
        uris, locations = split_locations(contents.table.slice(0, 100))
        unpack = _unpacker(os.getpid())
        fetched = list(fetch_inputs(plan_reads(uris["uri"].to_pylist(), locations, fetcher, 10**6, None, unpack), 1))
        assert sorted(entry.row for entry in fetched) == list(range(uris.num_rows))
        assert all(entry.error is None or (entry.error.message and not entry.data) for entry in fetched)

    return read


@functools.lru_cache
def _unpacker(process: int) -> Unpack:
    """Return the sandbox of a process that inputs are read in; it ends with that process."""
    return SandboxedGenerator(unpack_in_process, decode_limits(FAST))


def _sparse() -> bytes:
    """Return an archive with sparse members of both formats that GNU tar writes."""
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


def _column_types(images: list[bytes]) -> list[bytes]:
    """Return Parquet files whose images are in columns of other types than bytes."""
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
        printable(exc.message)
        return
    assert canonical_uri(uri) == uri
    split_bucket(uri)
    printable(display_uri(uri))


def targets() -> list[Target]:
    """Return all targets."""
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
            parquet(images), parquet(images, struct=False), parquet([None, *images]), *_column_types(images),
        ], _archive("parquet")),
        Target("configuration", [full.encode(), b"input: {uris: [s3://b/a/]}\noutput: {uri: s3://b/o}\n"], _config),
        Target("--set", [b"inference.actors=2", b"input.uris=[a, b]", b"model.transform={crop: 10}"], _setting),
        Target("URI", [b"s3://bucket/a/b.jpg", b"file:///data/1.jpg", b"photos/1.jpg", b"az://c@account/x", b"s3://b/a.tar#1.jpg"], _uri),
    ]  # fmt: skip
