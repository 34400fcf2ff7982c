"""Find inputs whose URI alone shows that they can't be read: they are counted and named before anything is started."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from batch_inference.errors import UserError
from batch_inference.inputs.member_uris import COMPRESSED, compressed_ending, unpack_remedy
from batch_inference.storage.spellings import https_remedy
from batch_inference.storage.uris import canonical_uri, display_uri
from batch_inference.text import format_count

_MAX_EXAMPLES = 3
_MAX_REASONS = 20
_OTHER_REASONS = ("the URI is not valid", "Correct the line.")
# Most lines pass this quick check: a bucket or folder, a name in it, and nothing that may be a signature.
_PLAIN = r"^(?:(?:s3|gs|az)://[^/@?&]+/[^?&]|file:///.)[^?&]*$"
_ARCHIVE = r"(?i)(?:" + "|".join(map(re.escape, COMPRESSED)) + r")$"


@dataclass(frozen=True)
class UnreadableInputs:
    """Inputs that can't be read for one reason.

    Attributes:
        reason: Why they can't be read.
        count: Number of these inputs.
        examples: The first of them.
        remedy: How to correct them.
    """

    reason: str
    count: int
    examples: tuple[str, ...]
    remedy: str

    @property
    def fact(self) -> str:
        """Reason and examples."""
        named = ", ".join(repr(uri) if not uri.strip() else display_uri(uri) for uri in self.examples)
        return f"{self.reason} ({named}{', …' if self.count > len(self.examples) else ''})"

    def __str__(self) -> str:
        return f"{format_count(self.count, 'input')} can't be read: {self.fact}. {self.remedy}"


def find_unreadable(uris: pa.Array | pa.ChunkedArray) -> tuple[UnreadableInputs, ...]:
    """Return the inputs that become failed rows whatever the store answers, most frequent reason first.

    Args:
        uris: All inputs, string; canonical if they have a canonical form.
    """
    archives = pc.match_substring_regex(uris, _ARCHIVE)
    suspects = pc.or_(pc.invert(pc.match_substring_regex(uris, _PLAIN)), archives)
    if not pc.any(suspects).as_py():
        return ()
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    remedies: dict[str, str] = {}
    for uri in pc.drop_null(pc.filter(uris, suspects)).to_pylist():
        explained = unreadable_reason(uri)
        if explained is None:
            continue
        reason, remedy = explained if explained[0] in counts or len(counts) < _MAX_REASONS else _OTHER_REASONS
        counts[reason] += 1
        remedies.setdefault(reason, remedy)
        if len(examples.setdefault(reason, [])) < _MAX_EXAMPLES:
            examples[reason].append(uri)
    return tuple(
        UnreadableInputs(reason, count, tuple(examples[reason]), remedies[reason])
        for reason, count in counts.most_common()
    )


def refuse_if_all_unreadable(unreadable: tuple[UnreadableInputs, ...], rows: int) -> None:
    """Raise UserError if none of a job's inputs can be read."""
    if rows and sum(group.count for group in unreadable) == rows:
        raise UserError(
            f"none of the {format_count(rows, 'input')} can be read: "
            + "; ".join(group.fact for group in unreadable[:_MAX_EXAMPLES]),
            " ".join(dict.fromkeys(group.remedy for group in unreadable[:_MAX_EXAMPLES])),
        )


def unreadable_reason(uri: str) -> tuple[str, str] | None:
    """Return why an input can't be read, and how to correct it; None if nothing speaks against it.

    >>> unreadable_reason("https://example.org/a.jpg")[0]
    'https:// is not read'
    """
    if not uri.strip():
        return "the line has no URI", "Write the image's URI, or leave the line out."
    scheme, sign, _ = uri.partition("://")
    if sign and scheme.lower() in ("http", "https", "ftp", "ftps", "sftp", "hdfs"):
        return f"{scheme.lower()}:// is not read", _url_remedy(uri, scheme.lower())
    try:
        canonical = canonical_uri(uri)
    except UserError as exc:
        # Messages repeat the line: without it, lines of one scheme share a reason.
        return exc.message.replace(uri, "the line"), exc.remedy
    if not canonical.startswith("file://") and not canonical.partition("://")[2].partition("/")[2].strip("/"):
        return "the URI names a bucket and no object", "Write BUCKET/KEY behind the scheme."
    return _archive_reason(uri)


def _archive_reason(uri: str) -> tuple[str, str] | None:
    """Return why an archive can't be read, and how to unpack it; None for any other name.

    >>> _archive_reason("s3://b/photos.zip")
    ('.zip is not supported', "Unpack: unzip 'photos.zip' -d 'photos'. Images hardly get smaller by compression.")
    """
    ending = compressed_ending(uri)
    return (f"{ending} is not supported", unpack_remedy([uri])) if ending else None


def _url_remedy(uri: str, scheme: str) -> str:
    """Return how to correct a URL."""
    if scheme == "hdfs":
        return "Copy the images to a disk or an object store: hdfs dfs -get SOURCE photos/"
    return https_remedy(uri) or (
        "Download the images first (wget --input-file=urls.txt --directory-prefix=photos), or copy them to s3://, gs:// or az://."
    )
