"""The plan of a job as one object: a tar of its manifest shards, ``_manifest/plan-ATTEMPT.tar``.

A plan is written under a name of its own before ``_job.json`` makes it *the* plan, so that two drivers that listed
different inputs at the same moment cannot mix their shards.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from batch_inference.output import manifest
from batch_inference.storage.store import PARALLEL_REQUESTS, Store


def pack(table: pa.Table, shard_size: int) -> tuple[bytes, str]:
    """Cut inputs into shards; return the tar of their files and the manifest's digest."""
    digest = hashlib.sha256()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for shard, part in manifest.cut_shards(table, shard_size):
            data = manifest.encode_shard(part)
            digest.update(hashlib.sha256(data).digest())
            info = tarfile.TarInfo(f"{manifest.shard_name(shard)}.parquet")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue(), digest.hexdigest()


def unpack(packed: bytes, put: Callable[[str, bytes], object]) -> None:
    """Pass path and content of every manifest shard of a plan to ``put``, several at a time."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar, ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        puts = [
            pool.submit(put, f"_manifest/{member.name}", content.read())
            for member in tar
            if (content := tar.extractfile(member)) is not None
        ]
        for pending in puts:
            pending.result()


def stored_digest(store: Store, shards: int) -> str:
    """Return the digest of the manifest as it is stored; a shard that is missing counts as empty."""
    digest = hashlib.sha256()
    paths = [manifest.shard_path(shard) for shard in range(shards)]
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        for data in pool.map(store.get_or_none, paths):
            digest.update(hashlib.sha256(data or b"").digest())
    return digest.hexdigest()
