from __future__ import annotations

import gzip
import io
import re
import tarfile
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_inference.errors import RowError
from batch_inference.inputs.tar import TarIndex, read_index
from tests.support.containers import FORMATS, MemoryFetcher, tar

URI = "s3://b/a.tar"


def read_archive(data: bytes) -> TarIndex:
    return read_index(URI, MemoryFetcher({URI: data}), lambda name: name.endswith(".jpg"))


class Archive(bytes):
    """Bytes that a failing test does not print."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes: {read_archive(self).locations}>"


@st.composite
def archives(draw: st.DrawFn) -> Archive:
    """Return archives with all that `tar` puts into them: long names, folders, links, members that come twice."""
    tar_format = draw(st.sampled_from(sorted(FORMATS)))
    letters = st.text(st.sampled_from("aAzZ09-_ #%é日"), min_size=1, max_size=12)
    # Longer than a header has room for, which each format deals with in its own way; ustar has only 100 + 155 bytes of ASCII.
    part = (
        st.text("ab", min_size=1, max_size=12)
        if tar_format == "ustar"
        else st.one_of(letters, letters.map(lambda t: 15 * t))
    )
    names = st.builds(
        lambda parts, end: "/".join(parts) + end,
        st.lists(part, min_size=1, max_size=3),
        st.sampled_from([".jpg", ".JPG", ".cls", ""]),
    )
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=FORMATS[tar_format]) as archive:
        earlier: list[str] = []
        for name in draw(st.lists(names, max_size=12)):
            info = tarfile.TarInfo(name)
            member_type = draw(st.sampled_from(["file"] * 5 + ["folder", "hard", "soft"]))
            if member_type == "file" or not earlier:
                data = draw(st.binary(max_size=30)) * draw(st.sampled_from([0, 1, 17, 40, 30000]))
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
                earlier.append(name)
                continue
            info.type = {"folder": tarfile.DIRTYPE, "hard": tarfile.LNKTYPE, "soft": tarfile.SYMTYPE}[member_type]
            info.linkname = (
                draw(st.sampled_from(earlier))
                if member_type == "hard"
                else "nowhere.jpg"
                if member_type == "soft"
                else ""
            )
            archive.addfile(info)
    return Archive(out.getvalue())


@given(archives())
def test_members_are_what_unpacking_gives(data: bytes) -> None:
    index = read_archive(data)
    unpacked: dict[str, bytes | None] = {}  # None: a link to nothing
    others = links = replaced = 0
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            name = member.name
            if member.isdir():
                continue
            if not name.endswith(".jpg"):
                others += 1
                continue
            if member.isreg():
                content = archive.extractfile(member).read()  # type: ignore[union-attr]
            elif member.linkname == name:
                links += 1
                continue
            else:
                content = unpacked.get(member.linkname)
            # A hard link to nothing is no file, one to a symbolic link is another symbolic link.
            is_file = member.isreg() or member.issym() or member.linkname in unpacked
            if name in unpacked:
                del unpacked[name]
                replaced += 1
            if is_file:
                unpacked[name] = content
            else:
                links += 1
    links += sum(content is None for content in unpacked.values())
    assert {name: data[start : start + size] for name, (start, size) in index.locations.items()} == {
        name: content for name, content in unpacked.items() if content is not None
    }
    assert index.replaced == replaced
    assert index.skipped.pop("link", 0) == links
    assert sum(index.skipped.values()) == others
    assert index.rest_error is None
    # One without members says so.
    assert [note for note in index.notes if "without members" not in note] == []


@given(archives(), st.data())
def test_cut_archive_lists_every_member_with_a_header(data: bytes, draws: st.DataObject) -> None:
    cut = draws.draw(st.integers(512, len(data)))
    expected: dict[str, tuple[int, int]] = {}
    first = None
    linked: set[str] = set()  # their data are another test's subject
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            first = first or member
            if member.issym() or member.islnk():
                linked.add(member.name)
            elif member.isreg() and member.name.endswith(".jpg") and member.offset_data <= cut:
                expected.pop(member.name, None)
                expected[member.name] = (member.offset_data, member.size)
    try:
        index = read_archive(data[:cut])
    except RowError:
        # Without a complete first header it is no tar file.
        assert first is not None
        assert first.offset_data > cut
        return
    certain = {name: location for name, location in expected.items() if name not in linked}
    assert {name: location for name, location in index.locations.items() if name in certain} == certain


def test_hidden_members_are_left_out_as_in_folders() -> None:
    names = ["./a.jpg", "../b.jpg", "._c.jpg", ".git/d.jpg", "x/.e.jpg", "x/f.jpg"]
    assert list(read_archive(tar(dict.fromkeys(names, b"1"))).locations) == ["./a.jpg", "../b.jpg", "x/f.jpg"]


def test_links_have_the_data_of_their_targets() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, tar_type, target in (
            ("d/a.jpg", tarfile.REGTYPE, ""),
            ("hard.jpg", tarfile.LNKTYPE, "d/a.jpg"),
            ("d/soft.jpg", tarfile.SYMTYPE, "a.jpg"),
            ("d/up.jpg", tarfile.SYMTYPE, "../hard.jpg"),
            ("gone.jpg", tarfile.SYMTYPE, "none.jpg"),
            ("d/circle.jpg", tarfile.SYMTYPE, "circle.jpg"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = tar_type, target, 3 * (tar_type == tarfile.REGTYPE)
            archive.addfile(info, io.BytesIO(b"abc"))
    index = read_archive(out.getvalue())
    assert index.locations == dict.fromkeys(["d/a.jpg", "hard.jpg", "d/soft.jpg", "d/up.jpg"], (512, 3))
    assert index.skipped == {"link": 2}


def test_names_that_are_not_utf8_are_listed_and_found() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        info = tarfile.TarInfo("ü.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    assert read_archive(out.getvalue()).locations == {"\\xfc.jpg": (512, 3)}


def header(name: str, size: int = 3) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("data", "error_type", "fact"),
    [
        (b"", "EMPTY_FILE", "the file is empty, not a tar file"),
        (b"no tar at all" * 1000, "UNKNOWN_FORMAT", "the file is not a tar file: it looks like text"),
        (b"<!DOCTYPE html><html>503</html>", "UNKNOWN_FORMAT", "it looks like an HTML page"),
        (gzip.compress(tar({"a.jpg": b"1"}), mtime=0), "UNKNOWN_FORMAT", "the file is gzip, not a tar file: members of"),
        (b"\xff" * 100 + tar({"a.jpg": b"1"})[100:], "CORRUPT", "damaged at byte 0: its first header is not intact, and the 10,240 bytes"),
    ],
    ids=["empty", "text", "html", "gzip", "header"],
)  # fmt: skip
def test_file_of_which_no_member_is_known(data: bytes, error_type: str, fact: str) -> None:
    with pytest.raises(RowError) as caught:
        read_archive(data)
    assert (caught.value.error.stage, caught.value.error.error_type) == ("list", error_type)
    assert fact in caught.value.fact
    assert caught.value.remedy
    assert caught.value.error.message == f"{caught.value.fact}. {caught.value.remedy}"


@pytest.mark.parametrize(
    ("data", "error_type", "fact"),
    [
        (
            tar({"a.jpg": b"1"})[:1024] + b"rubbish!" * 64 + tar({"b.jpg": b"1"}),
            "CORRUPT",
            "damaged at byte 1,024, after 1 image: no tar header is there, and the 10,752 bytes from byte 1,024 on",
        ),
        (
            tar({"a.jpg": b"1"}) + b"-",
            "CORRUPT",
            "after the end mark at byte 1,024 and 1 image comes something other than a tar archive: the 1 byte from byte 10,240",
        ),
        (
            tar({"a.jpg": b"1"}) + gzip.compress(tar({"b.jpg": b"1"})),
            "CORRUPT",
            "something other than a tar archive, which begins like gzip: the",
        ),
        (
            tar({"a.jpg": b"1", "b.jpg": b"2"})[:1300],
            "TRUNCATED",
            "ends at byte 1,300 within the header at byte 1,024, after 1 image",
        ),
        (
            tar({"a.jpg": b"1", "b.txt": bytes(2000)})[:2000],
            "TRUNCATED",
            "ends at byte 2,000 within the member at byte 1,024, after 1 image",
        ),
        (tar({"a.jpg": b"1"})[:1024] + header("b.jpg", -1), "CORRUPT", "damaged at byte 1,024"),
    ],
    ids=["damaged", "one byte", "gzip behind", "header cut", "text cut", "negative size"],
)  # fmt: skip
def test_members_before_damage_are_inputs_and_the_rest_is_named(data: bytes, error_type: str, fact: str) -> None:
    index = read_archive(data)
    assert list(index.locations) == ["a.jpg"]
    assert index.rest_error is not None
    assert (index.rest_error.error.stage, index.rest_error.error.error_type) == ("list", error_type)
    assert fact in index.rest_error.fact


def test_bytes_that_are_all_zero_are_no_empty_archive() -> None:
    index = read_archive(bytes(10240))
    assert (index.locations, index.rest_error) == ({}, None)
    assert "is an archive without members" in index.notes[0]
    index = read_archive(bytes(20480))
    assert index.rest_error is not None
    assert "20,480 bytes, and all of them are zero" in index.rest_error.fact


def sparse(name: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = tarfile.GNUTYPE_SPARSE
    return info.tobuf(tarfile.GNU_FORMAT)


def test_sparse_images_fail_alone_and_other_sparse_members_are_left_out() -> None:
    assert read_archive(sparse("a.bin") + bytes(1024)).skipped == {".bin": 1}
    index = read_archive(sparse("a.jpg") + tar({"b.jpg": b"1"}))
    assert list(index.locations) == ["b.jpg"]
    assert index.rest_error is None
    assert list(index.failed) == ["a.jpg"]
    assert index.failed["a.jpg"].error.error_type == "SPARSE_MEMBER"
    # A later member of that name replaces it, as any other.
    index = read_archive(sparse("b.jpg") + tar({"b.jpg": b"1"}))
    assert (list(index.locations), index.failed, index.replaced) == (["b.jpg"], {}, 1)


def test_rest_of_a_member_from_another_volume_fails() -> None:
    info = tarfile.TarInfo("a.jpg")
    info.type, info.size = b"M", 600
    index = read_archive(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024) + tar({"b.jpg": b"1"}))
    assert list(index.locations) == ["b.jpg"]
    assert "begins in another volume" in index.failed["a.jpg"].fact


def test_devices_named_like_images_are_counted() -> None:
    info = tarfile.TarInfo("a.jpg")
    info.type = tarfile.FIFOTYPE
    assert read_archive(info.tobuf() + bytes(1024)).skipped == {"special file": 1}


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (tar({"a.jpg": bytes(2000)})[:1500], "ends at byte 1,500 within a member"),
        (tar({"a.jpg": bytes(500)})[:1011], "ends at byte 1,011 within a member"),
        (tar({"a.jpg": bytes(500)})[:1012], "ends at byte 1,012 without an end mark"),
        (tar({"a.jpg": bytes(500)})[:1024], "ends at byte 1,024 without an end mark"),
        (tar({"a.jpg": b"1", "b.txt": b"2"})[:1537], "ends at byte 1,537 without an end mark"),
        (tar({"a.jpg": bytes(500)})[:1600], "ends at byte 1,600 within its end mark"),
        (tar({"a.jpg": b"1"}), None),
    ],
)
def test_oddity_at_the_end_is_noted(data: bytes, note: str | None) -> None:
    index = read_archive(data)
    assert list(index.locations) == ["a.jpg"]
    assert index.rest_error is None
    assert len(index.notes) == (note is not None)
    assert (note or "") in "".join(index.notes)


@pytest.mark.parametrize("zeros", [0, 512, 10240, 5 * 1024 * 1024])
def test_joined_archives_are_read_on(zeros: int) -> None:
    data = tar({"a.jpg": b"1", "x.jpg": b"old"}) + bytes(zeros) + tar({"b.jpg": b"22", "x.jpg": b"newer"})
    index = read_archive(data)
    contents = {name: data[start : start + size] for name, (start, size) in index.locations.items()}
    assert contents == {"a.jpg": b"1", "b.jpg": b"22", "x.jpg": b"newer"}
    assert list(index.locations) == ["a.jpg", "b.jpg", "x.jpg"]
    assert (index.replaced, index.rest_error) == (1, None)
    (note,) = index.notes
    begin = 10240 + zeros
    assert (
        f"2 archives one after another, which are all read: the first ends at byte 2,048, the second begins at byte {begin:,}"
        in note
    )


def test_lone_block_of_zeros_is_named() -> None:
    data = tar({"a.jpg": b"1"})[:1024] + bytes(512) + tar({"b.jpg": b"2"})
    index = read_archive(data)
    assert list(index.locations) == ["a.jpg", "b.jpg"]
    assert "a lone block of zeros at byte 1,024" in index.notes[0]


@pytest.mark.parametrize("size", [100, 1_000_000])
def test_ordinary_padding_costs_one_request_at_most(size: int) -> None:
    data = tar({f"{n}.jpg": bytes(size) for n in range(5)})
    bare = data[: 5 * (512 + -(-size // 512) * 512)]
    fetchers = [MemoryFetcher({URI: archive}) for archive in (bare, data)]
    for fetcher in fetchers:
        assert len(read_index(URI, fetcher, lambda name: True).locations) == 5
    assert len(fetchers[1].ranges) <= len(fetchers[0].ranges) + 1


# --- damage ---

NOISE = bytes(range(1, 256)) * 3


@dataclass(frozen=True)
class Written:
    """A member of an archive: its name and data, and the first bytes of its headers and of its data."""

    name: str
    data: bytes
    begin: int
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.data)


@st.composite
def written(draw: st.DrawFn, prefix: str) -> tuple[Archive, list[Written]]:
    """An archive of images with data that is not zero, and damage is in it."""
    tar_format = draw(st.sampled_from(sorted(FORMATS)))
    out = io.BytesIO()
    lengths = draw(st.lists(st.sampled_from([1, 60, 200]), min_size=1, max_size=4))
    with tarfile.open(fileobj=out, mode="w", format=FORMATS[tar_format]) as archive:
        for number, length in enumerate(lengths):
            # Of 255 bytes at most, cut where a ustar header cuts.
            name = f"{prefix}{number}" + "/n" * (length // 2) + ".jpg"
            if tar_format == "pax" and draw(st.booleans()):
                name = f"é{name}"
            data = draw(st.sampled_from([1, 511, 512, 513, 1500])) * b"\xff"
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    bytes_ = out.getvalue()
    with tarfile.open(fileobj=io.BytesIO(bytes_)) as archive:
        members = [Written(m.name, b"\xff" * m.size, m.offset, m.offset_data) for m in archive]
    if draw(st.booleans()):
        # Some writers leave out padding, or the end mark as well.
        keep = -(-members[-1].end // 512) * 512 + draw(st.sampled_from([0, 512, 1024, 2048]))
        bytes_ = bytes_[:keep]
    return Archive(bytes_), members


@given(st.data())
def test_missing_member_is_always_reported(draws: st.DataObject) -> None:
    """Every image before the damage is listed; every missing one lies after a byte that a note or a failure names."""
    draw = draws.draw
    parts = [draw(written("a"))]
    data, members = parts[0]
    begins = [0]
    for prefix in draw(st.sampled_from(["", "", "b", "bc"])):
        gap = 512 * draw(st.sampled_from([0, 1, 2, 30]))
        more, further = draw(written(prefix))
        begin = len(data) + gap
        begins.append(begin)
        members = [*members, *(Written(m.name, m.data, m.begin + begin, m.start + begin) for m in further)]
        data = data + bytes(gap) + more
    size = len(data)
    damaged_from = damaged_to = size
    if draw(st.booleans()):
        begin_of_sparse = draw(st.sampled_from(members)).begin
        data = data[:begin_of_sparse] + sparse("sparse.jpg") + data[begin_of_sparse:]
        members = [
            m if m.begin < begin_of_sparse else Written(m.name, m.data, m.begin + 512, m.start + 512) for m in members
        ]
        size = damaged_from = damaged_to = len(data)
    else:
        begin_of_sparse = None
    damage = draw(st.sampled_from(["nothing", "cut", "noise", "zeros", "rubbish"]))
    if damage == "cut":
        damaged_from = draw(st.integers(0, size))
        data = data[:damaged_from]
        if data.endswith(bytes(1024)):
            # A whole end mark: that another archive was joined to this one nobody can know.
            members = [member for member in members if member.begin < damaged_from]
    elif damage in ("noise", "zeros"):
        member = draw(st.sampled_from(members))
        damaged_from = draw(st.sampled_from([member.begin, member.start - 512]))
        damaged_to = damaged_from + 512
        data = data[:damaged_from] + (NOISE[:512] if damage == "noise" else bytes(512)) + data[damaged_to:]
    elif damage == "rubbish":
        data += NOISE[: draw(st.integers(1, 600))]
    try:
        index = read_archive(Archive(data))
    except RowError as exc:
        assert exc.error.stage == "list"
        assert damaged_from < members[0].start
        return
    reports = [*index.notes, *([index.rest_error.fact] if index.rest_error else [])]
    named = [int(number.replace(",", "")) for text in reports for number in re.findall(r"byte ([\d,]+)", text)]
    for member in members:
        location = index.locations.get(member.name)
        if member.end <= damaged_from:
            assert location == (member.start, len(member.data)), member
            assert data[member.start : member.end] == member.data
        elif location is None:
            assert min(named, default=size + 1) <= member.end, member
        elif member.end > len(data):
            assert location == (member.start, len(member.data))  # its row is TRUNCATED
    assert set(index.locations) <= {member.name for member in members}
    if begin_of_sparse is not None and begin_of_sparse + 512 <= damaged_from:
        assert list(index.failed) == ["sparse.jpg"]
    if damage == "nothing":
        assert index.rest_error is None
        assert len(index.locations) == len(members)
    if damage == "rubbish":
        assert index.rest_error is not None


def test_large_members_cost_only_their_headers() -> None:
    data = tar({f"{n}.jpg": bytes(1_000_000) for n in range(40)})
    fetcher = MemoryFetcher({URI: data})
    assert len(read_index(URI, fetcher, lambda name: True).locations) == 40
    assert len(fetcher.ranges) <= 42
    assert sum(end - start for start, end in fetcher.ranges) < 0.01 * len(data)


def test_small_members_are_read_through_with_few_requests() -> None:
    data = tar({f"{n}.jpg": bytes(20_000) for n in range(1000)})
    fetcher = MemoryFetcher({URI: data})
    assert len(read_index(URI, fetcher, lambda name: True).locations) == 1000
    assert len(fetcher.ranges) < 25
    assert sum(end - start for start, end in fetcher.ranges) < 1.3 * len(data)


def test_file_that_changes_while_it_is_read_is_not_trusted() -> None:
    fetcher = MemoryFetcher({URI: tar({f"{n}.jpg": bytes(1_000_000) for n in range(3)})})
    real = fetcher.fetch_range

    def replaced(uri: str, start: int, end: int) -> object:
        fetcher.etag = str(len(fetcher.ranges))
        return real(uri, start, end)

    fetcher.fetch_range = replaced  # type: ignore[assignment,method-assign]
    with pytest.raises(RowError, match="replaced while it was read"):
        read_index(URI, fetcher, lambda name: True)
