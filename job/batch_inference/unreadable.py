"""Inputs of which the URI alone says that they can't be read: counted and named before anything is started."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from batch_inference import containers
from batch_inference.errors import UserError
from batch_inference.spellings import of_https
from batch_inference.storage import canonical_uri, display
from batch_inference.wording import count_of

_FIRST = 3
_REASONS = 20
_REST = ("the URI is not valid", "Correct the line.")
# Most lines are fine, and this is all that is asked of them: a place, something behind it, and nothing that may be a signature.
_PLAIN = r"^(?:(?:s3|gs|az)://[^/@?&]+/[^?&]|file:///.)[^?&]*$"
_ARCHIVE = r"(?i)(?:" + "|".join(map(re.escape, containers.COMPRESSED)) + r")$"


@dataclass(frozen=True)
class Unreadable:
    """Inputs that can't be read for one reason.

    Attributes:
        reason: What is wrong with them.
        count: How many there are.
        first: The first of them.
        remedy: What to write instead.
    """

    reason: str
    count: int
    first: tuple[str, ...]
    remedy: str

    @property
    def fact(self) -> str:
        """Reason and examples."""
        shown = ", ".join(repr(uri) if not uri.strip() else display(uri) for uri in self.first)
        return f"{self.reason} ({shown}{', …' if self.count > len(self.first) else ''})"

    def __str__(self) -> str:
        return f"{count_of(self.count, 'input')} can't be read: {self.fact}. {self.remedy}"


def unreadable(uris: pa.Array | pa.ChunkedArray) -> tuple[Unreadable, ...]:
    """Find inputs that end as failed rows whatever the store answers, most frequent reason first.

    Args:
        uris: All inputs, string; canonical where a canonical form exists.
    """
    archives = pc.match_substring_regex(uris, _ARCHIVE)
    odd = pc.or_(pc.invert(pc.match_substring_regex(uris, _PLAIN)), archives)
    if not pc.any(odd).as_py():
        return ()
    counts: Counter[str] = Counter()
    first: dict[str, list[str]] = {}
    remedies: dict[str, str] = {}
    for uri in pc.drop_null(pc.filter(uris, odd)).to_pylist():
        found = reason(uri)
        if found is None:
            continue
        why, remedy = found if found[0] in counts or len(counts) < _REASONS else _REST
        counts[why] += 1
        remedies.setdefault(why, remedy)
        examples = first.setdefault(why, [])
        if len(examples) < _FIRST:
            examples.append(uri)
    return tuple(Unreadable(why, count, tuple(first[why]), remedies[why]) for why, count in counts.most_common())


def refuse_all(kinds: tuple[Unreadable, ...], rows: int) -> None:
    """Raise UserError where none of a job's inputs can be read."""
    if rows and sum(kind.count for kind in kinds) == rows:
        raise UserError(
            f"none of the {count_of(rows, 'input')} can be read: " + "; ".join(kind.fact for kind in kinds[:_FIRST]),
            " ".join(dict.fromkeys(kind.remedy for kind in kinds[:_FIRST])),
        )


def reason(uri: str) -> tuple[str, str] | None:
    """Return why an input can't be read, and what to write instead; None where nothing speaks against it.

    >>> reason("https://example.org/a.jpg")[0]
    'https:// is not read'
    """
    if not uri.strip():
        return "the line has no URI", "Write the image's URI, or leave the line out."
    scheme, sign, _ = uri.partition("://")
    if sign and scheme.lower() in ("http", "https", "ftp", "ftps", "sftp", "hdfs"):
        return f"{scheme.lower()}:// is not read", _instead(uri, scheme.lower())
    try:
        canonical = canonical_uri(uri)
    except UserError as exc:
        # A kind for all lines of a scheme: messages repeat the line.
        what = exc.message.replace(uri, "the line")
        return what, exc.remedy
    if not canonical.startswith("file://") and not canonical.partition("://")[2].partition("/")[2].strip("/"):
        return "the URI names a bucket and no object", "Write BUCKET/KEY behind the scheme."
    return archive(uri)


def archive(uri: str) -> tuple[str, str] | None:
    """Return why an archive can't be read, and how to unpack it; None for any other name.

    >>> archive("s3://b/photos.zip")
    ('.zip is not supported', "Unpack: unzip 'photos.zip' -d 'photos'. Images hardly get smaller by compression.")
    """
    ending = containers.compressed_ending(uri)
    return (f"{ending} is not supported", containers.unpacking([uri])) if ending else None


def _instead(uri: str, scheme: str) -> str:
    """Return what to write instead of a URL."""
    if scheme == "hdfs":
        return "Copy the images to a disk or an object store: hdfs dfs -get SOURCE photos/"
    return of_https(uri) or (
        "Download the images first (wget --input-file=urls.txt --directory-prefix=photos), or copy them to s3://, gs:// or az://."
    )
