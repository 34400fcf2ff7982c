"""A shard's inputs as few large requests: members of one file that follow one another are read together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from batch_inference import parquet_files, tar_files
from batch_inference.containers import NO_SUCH_MEMBER, error_of, split_member
from batch_inference.errors import RowFailure, UserError
from batch_inference.fetcher import Answer, Fetcher, Request
from batch_inference.prefixes import Prefixes
from batch_inference.runs import Failed, Fetched, Member, Run
from batch_inference.storage import canonical_uri


def runs(
    uris: list[str],
    places: pa.Table | None,
    fetcher: Fetcher,
    max_bytes: int,
    prefixes: Prefixes | None = None,
    unpack: parquet_files.Unpack = parquet_files.unpacked,
) -> Iterator[Run]:
    """Cuts a shard's inputs into runs.

    Objects by themselves keep their order; members of a file are taken together where its first one stands, in the order of
    the file.

    Args:
        uris: The shard's inputs.
        places: Which version of each is meant, and where members lie: columns of ``PLACE_SCHEMA``, or ``_version`` alone where none
            is a member; None: whatever is there is meant.
        fetcher: Reads them.
        max_bytes: Larger inputs are not read.
        prefixes: Inputs that lie elsewhere are not read; None: no limit.
        unpack: Where row groups of Parquet files are unpacked.
    """
    versions = [None] * len(uris) if places is None else places["_version"].to_pylist()

    def one(row: int) -> Run:
        refusal = prefixes.refusal(uris[row]) if prefixes else None
        return Failed([row], refusal) if refusal else _Object(row, uris[row], versions[row], fetcher, max_bytes)

    if places is None or "_offset" not in places.column_names:
        yield from map(one, range(len(uris)))
        return
    files: dict[str, list[Member]] = {}
    order: list[int | str] = []
    columns = [places[name].to_pylist() for name in ("_offset", "_size", "_column")]
    # Manifests of earlier versions have no such column.
    errors = places["_error"].to_pylist() if "_error" in places.column_names else [None] * len(uris)
    for row, (uri, version, offset, size, column) in enumerate(zip(uris, versions, *columns, strict=True)):
        if (known := error_of(errors[row])) is not None:
            yield Failed([row], known)
            continue
        split = None if offset is None else split_member(uri)
        # The plan has no place for members of files that are not allowed; whoever changed it gets no further than here.
        if split is None or (prefixes and prefixes.refusal(uri)):
            order.append(row)
            continue
        if split[0] not in files:
            order.append(split[0])
        files.setdefault(split[0], []).append(Member(row, offset, size, version, column or ""))
    for item in order:
        if isinstance(item, int):
            yield one(item)
            continue
        members = sorted(files[item], key=lambda member: member.offset)
        missing = [member.row for member in members if member.offset == NO_SUCH_MEMBER]
        if missing:
            yield Failed(missing, RowFailure("fetch", "NOT_FOUND", f"there is no such member in {item}").error)
        present = members[len(missing) :]
        if present and item.lower().endswith(".tar"):
            yield from tar_files.spans(item, present, fetcher, max_bytes)
        elif present:
            yield from parquet_files.row_groups(item, present, fetcher, max_bytes, unpack)


@dataclass(frozen=True)
class _Object:
    row: int
    uri: str
    version: int | None
    fetcher: Fetcher
    max_bytes: int

    @property
    def rows(self) -> list[int]:
        return [self.row]

    def requests(self) -> Iterator[Request]:
        yield Request(self._read)

    def _read(self) -> bytes:
        try:
            canonical_uri(self.uri)
        except UserError as exc:
            raise RowFailure("list", "INVALID_URI", f"{exc.message}. {exc.remedy}") from exc
        if not self.uri:
            raise RowFailure("list", "INVALID_URI", "the manifest has no URI in this line")
        return self.fetcher.fetch(self.uri, self.max_bytes, self.version)

    def inputs(self, take: Callable[[], Answer]) -> Iterator[Fetched]:
        answer = take()
        yield Fetched(self.row, answer.data, answer.error, answer.seconds)  # type: ignore[arg-type]
