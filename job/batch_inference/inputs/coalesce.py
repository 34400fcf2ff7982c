"""Plan a shard's inputs as few large reads: members of one file that follow one another are fetched together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from batch_inference.errors import RowError, UserError
from batch_inference.inputs import parquet, tar
from batch_inference.inputs.allowlist import Allowlist
from batch_inference.inputs.file_errors import parse_error
from batch_inference.inputs.member_uris import split_member
from batch_inference.inputs.reads import CoalescedRead, FetchedInput, Member, SkippedRead
from batch_inference.output.manifest import NO_SUCH_MEMBER
from batch_inference.storage.fetcher import Fetcher
from batch_inference.storage.read_ahead import Answer, Request
from batch_inference.storage.uris import canonical_uri


def plan_reads(
    uris: list[str],
    locations: pa.Table | None,
    fetcher: Fetcher,
    max_bytes: int,
    allowlist: Allowlist | None = None,
    unpack: parquet.Unpack = parquet.unpack_in_process,
) -> Iterator[CoalescedRead]:
    """Yield the reads that fetch a shard's inputs.

    Objects keep their order. The members of a file are read where its first one stands, in the order of the file.

    Args:
        uris: The shard's inputs.
        locations: Columns of ``LOCATION_SCHEMA``, or ``_version`` alone where no input is a member; None: objects are read as they
            are at that moment.
        fetcher: Sends the requests.
        max_bytes: Larger inputs are not read.
        allowlist: Inputs that it refuses are not read; None: no limit.
        unpack: Unpacks the row groups of Parquet files.
    """
    etag_hashes = [None] * len(uris) if locations is None else locations["_version"].to_pylist()

    def object_read(row: int) -> CoalescedRead:
        refusal = allowlist.refusal(uris[row]) if allowlist else None
        return (
            SkippedRead([row], refusal)
            if refusal
            else _ObjectRead(row, uris[row], etag_hashes[row], fetcher, max_bytes)
        )

    if locations is None or "_offset" not in locations.column_names:
        yield from map(object_read, range(len(uris)))
        return
    skipped, order = _group_by_file(uris, locations, allowlist)
    yield from skipped
    for item in order:
        if isinstance(item, int):
            yield object_read(item)
        else:
            yield from _member_reads(*item, fetcher, max_bytes, unpack)


def _group_by_file(
    uris: list[str], locations: pa.Table, allowlist: Allowlist | None
) -> tuple[list[SkippedRead], list[int | tuple[str, list[Member]]]]:
    """Return the inputs whose failure is known, then rows of objects and files with their members, in the shard's order."""
    skipped: list[SkippedRead] = []
    files: dict[str, list[Member]] = {}
    order: list[int | tuple[str, list[Member]]] = []
    columns = [locations[name].to_pylist() for name in ("_version", "_offset", "_size", "_column")]
    # Manifests of earlier versions have no such column.
    errors = locations["_error"].to_pylist() if "_error" in locations.column_names else [None] * len(uris)
    for row, (uri, error, etag_hash, offset, size, column) in enumerate(zip(uris, errors, *columns, strict=True)):
        if (known := parse_error(error)) is not None:
            skipped.append(SkippedRead([row], known))
            continue
        parts = None if offset is None else split_member(uri)
        # The plan locates no members of files that are not allowed. A plan that was tampered with gets no further than here.
        if parts is None or (allowlist and allowlist.refusal(uri)):
            order.append(row)
            continue
        file = parts[0]
        if file not in files:
            files[file] = []
            order.append((file, files[file]))
        files[file].append(Member(row, offset, size, etag_hash, column or ""))
    return skipped, order


def _member_reads(
    uri: str, members: list[Member], fetcher: Fetcher, max_bytes: int, unpack: parquet.Unpack
) -> Iterator[CoalescedRead]:
    members = sorted(members, key=lambda member: member.offset)
    missing = [member.row for member in members if member.offset == NO_SUCH_MEMBER]
    if missing:
        yield SkippedRead(missing, RowError("fetch", "NOT_FOUND", f"there is no such member in {uri}").error)
    present = members[len(missing) :]
    if present and uri.lower().endswith(".tar"):
        yield from tar.span_reads(uri, present, fetcher, max_bytes)
    elif present:
        yield from parquet.row_group_reads(uri, present, fetcher, max_bytes, unpack)


@dataclass(frozen=True)
class _ObjectRead:
    """One object that is an input by itself."""

    row: int
    uri: str
    etag_hash: int | None
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
            raise RowError("list", "INVALID_URI", f"{exc.message}. {exc.remedy}") from exc
        if not self.uri:
            raise RowError("list", "INVALID_URI", "the manifest has no URI in this line")
        return self.fetcher.fetch(self.uri, self.max_bytes, self.etag_hash)

    def inputs(self, next_answer: Callable[[], Answer]) -> Iterator[FetchedInput]:
        answer = next_answer()
        yield FetchedInput(self.row, answer.data, answer.error, answer.seconds)  # type: ignore[arg-type]
