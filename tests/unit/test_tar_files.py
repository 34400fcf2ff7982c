from __future__ import annotations

import gzip
import io
import re
import tarfile
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_inference.errors import RowFailure
from batch_inference.tar_files import TarIndex, index
from tests.unit.containers import FORMATS, MemoryFetcher, tar

URI = "s3://b/a.tar"


def look(data: bytes) -> TarIndex:
    return index(URI, MemoryFetcher({URI: data}), lambda name: name.endswith(".jpg"))


class Archive(bytes):
    """Bytes that a failing test does not print."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes: {look(self).places}>"


@st.composite
def archives(draw: st.DrawFn) -> Archive:
    """Archives with all that `tar` puts into them: long names, folders, links, members that come twice."""
    kind = draw(st.sampled_from(sorted(FORMATS)))
    letters = st.text(st.sampled_from("aAzZ09-_ #%é日"), min_size=1, max_size=12)
    # Longer than a header has room for, which each format deals with in its own way; ustar knows but 100 + 155 bytes of ASCII.
    part = (
        st.text("ab", min_size=1, max_size=12) if kind == "ustar" else st.one_of(letters, letters.map(lambda t: 15 * t))
    )
    names = st.builds(
        lambda parts, end: "/".join(parts) + end,
        st.lists(part, min_size=1, max_size=3),
        st.sampled_from([".jpg", ".JPG", ".cls", ""]),
    )
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=FORMATS[kind]) as archive:
        earlier: list[str] = []
        for name in draw(st.lists(names, max_size=12)):
            info = tarfile.TarInfo(name)
            what = draw(st.sampled_from(["file"] * 5 + ["folder", "hard", "soft"]))
            if what == "file" or not earlier:
                data = draw(st.binary(max_size=30)) * draw(st.sampled_from([0, 1, 17, 40, 30000]))
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
                earlier.append(name)
                continue
            info.type = {"folder": tarfile.DIRTYPE, "hard": tarfile.LNKTYPE, "soft": tarfile.SYMTYPE}[what]
            info.linkname = (
                draw(st.sampled_from(earlier)) if what == "hard" else "nowhere.jpg" if what == "soft" else ""
            )
            archive.addfile(info)
    return Archive(out.getvalue())


@given(archives())
def test_members_are_what_unpacking_gives(data: bytes) -> None:
    found = look(data)
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
            there = member.isreg() or member.issym() or member.linkname in unpacked
            if name in unpacked:
                del unpacked[name]
                replaced += 1
            if there:
                unpacked[name] = content
            else:
                links += 1
    links += sum(content is None for content in unpacked.values())
    assert {name: data[start : start + size] for name, (start, size) in found.places.items()} == {
        name: content for name, content in unpacked.items() if content is not None
    }
    assert found.replaced == replaced
    assert found.skipped.pop("link", 0) == links
    assert sum(found.skipped.values()) == others
    assert found.rest is None
    # One without members says so.
    assert [note for note in found.notes if "without members" not in note] == []


@given(archives(), st.data())
def test_of_a_cut_archive_every_member_is_found_whose_header_is_there(data: bytes, draws: st.DataObject) -> None:
    cut = draws.draw(st.integers(512, len(data)))
    expected: dict[str, tuple[int, int]] = {}
    first = None
    linked: set[str] = set()  # what these are is the other test's matter
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            first = first or member
            if member.issym() or member.islnk():
                linked.add(member.name)
            elif member.isreg() and member.name.endswith(".jpg") and member.offset_data <= cut:
                expected.pop(member.name, None)
                expected[member.name] = (member.offset_data, member.size)
    try:
        found = look(data[:cut])
    except RowFailure:
        # Where even the first header is not whole it is no tar file.
        assert first is not None
        assert first.offset_data > cut
        return
    whole = {name: place for name, place in expected.items() if name not in linked}
    assert {name: place for name, place in found.places.items() if name in whole} == whole


def test_hidden_members_are_left_out_as_in_folders() -> None:
    names = ["./a.jpg", "../b.jpg", "._c.jpg", ".git/d.jpg", "x/.e.jpg", "x/f.jpg"]
    assert list(look(tar(dict.fromkeys(names, b"1"))).places) == ["./a.jpg", "../b.jpg", "x/f.jpg"]


def test_links_are_what_they_stand_for() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind, target in (
            ("d/a.jpg", tarfile.REGTYPE, ""),
            ("hard.jpg", tarfile.LNKTYPE, "d/a.jpg"),
            ("d/soft.jpg", tarfile.SYMTYPE, "a.jpg"),
            ("d/up.jpg", tarfile.SYMTYPE, "../hard.jpg"),
            ("gone.jpg", tarfile.SYMTYPE, "none.jpg"),
            ("d/circle.jpg", tarfile.SYMTYPE, "circle.jpg"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, 3 * (kind == tarfile.REGTYPE)
            archive.addfile(info, io.BytesIO(b"abc"))
    found = look(out.getvalue())
    assert found.places == dict.fromkeys(["d/a.jpg", "hard.jpg", "d/soft.jpg", "d/up.jpg"], (512, 3))
    assert found.skipped == {"link": 2}


def test_names_that_are_not_utf8_are_listed_and_found() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        info = tarfile.TarInfo("ü.jpg")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    assert look(out.getvalue()).places == {"\\xfc.jpg": (512, 3)}


def header(name: str, size: int = 3) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("data", "kind", "fact"),
    [
        (b"", "EMPTY_FILE", "the file is empty, not a tar file"),
        (b"no tar at all" * 1000, "UNKNOWN_FORMAT", "the file is not a tar file: it looks like text"),
        (b"<!DOCTYPE html><html>503</html>", "UNKNOWN_FORMAT", "it looks like an HTML page"),
        (gzip.compress(tar({"a.jpg": b"1"}), mtime=0), "UNKNOWN_FORMAT", "the file is gzip, not a tar file: members of"),
        (b"\xff" * 100 + tar({"a.jpg": b"1"})[100:], "CORRUPT", "damaged at byte 0: its first header is not whole, and the 10,240 bytes"),
    ],
    ids=["empty", "text", "html", "gzip", "header"],
)  # fmt: skip
def test_file_of_which_no_member_is_known(data: bytes, kind: str, fact: str) -> None:
    with pytest.raises(RowFailure) as caught:
        look(data)
    assert (caught.value.error.stage, caught.value.error.error_type) == ("list", kind)
    assert fact in caught.value.fact
    assert caught.value.remedy
    assert caught.value.error.message == f"{caught.value.fact}. {caught.value.remedy}"


@pytest.mark.parametrize(
    ("data", "kind", "fact"),
    [
        (
            tar({"a.jpg": b"1"})[:1024] + b"rubbish!" * 64 + tar({"b.jpg": b"1"}),
            "CORRUPT",
            "damaged at byte 1,024, behind 1 images: no tar header is there, and the 10,752 bytes from byte 1,024 on",
        ),
        (
            tar({"a.jpg": b"1"}) + b"-",
            "CORRUPT",
            "behind the end mark at byte 1,024 and 1 images there is something else than a tar archive: the 1 bytes from byte 10,240",
        ),
        (
            tar({"a.jpg": b"1"}) + gzip.compress(tar({"b.jpg": b"1"})),
            "CORRUPT",
            "something else than a tar archive, which begins like gzip: the",
        ),
        (
            tar({"a.jpg": b"1", "b.jpg": b"2"})[:1300],
            "TRUNCATED",
            "ends at byte 1,300 within the header at byte 1,024, behind 1 images",
        ),
        (
            tar({"a.jpg": b"1", "b.txt": bytes(2000)})[:2000],
            "TRUNCATED",
            "ends at byte 2,000 within the member at byte 1,024, behind 1 images",
        ),
        (tar({"a.jpg": b"1"})[:1024] + header("b.jpg", -1), "CORRUPT", "damaged at byte 1,024"),
    ],
    ids=["damaged", "one byte", "gzip behind", "header cut", "text cut", "negative size"],
)  # fmt: skip
def test_members_before_damage_are_inputs_and_the_rest_is_named(data: bytes, kind: str, fact: str) -> None:
    found = look(data)
    assert list(found.places) == ["a.jpg"]
    assert found.rest is not None
    assert (found.rest.error.stage, found.rest.error.error_type) == ("list", kind)
    assert fact in found.rest.fact


def test_bytes_that_are_all_zero_are_no_empty_archive() -> None:
    found = look(bytes(10240))
    assert (found.places, found.rest) == ({}, None)
    assert "is an archive without members" in found.notes[0]
    found = look(bytes(20480))
    assert found.rest is not None
    assert "20,480 bytes, and all of them are zero" in found.rest.fact


def sparse(name: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = tarfile.GNUTYPE_SPARSE
    return info.tobuf(tarfile.GNU_FORMAT)


def test_sparse_images_fail_alone_and_other_sparse_members_are_left_out() -> None:
    assert look(sparse("a.bin") + bytes(1024)).skipped == {".bin": 1}
    found = look(sparse("a.jpg") + tar({"b.jpg": b"1"}))
    assert list(found.places) == ["b.jpg"]
    assert found.rest is None
    assert list(found.failed) == ["a.jpg"]
    assert found.failed["a.jpg"].error.error_type == "SPARSE_MEMBER"
    # A later member of that name replaces it, as any other.
    found = look(sparse("b.jpg") + tar({"b.jpg": b"1"}))
    assert (list(found.places), found.failed, found.replaced) == (["b.jpg"], {}, 1)


def test_rest_of_a_member_from_another_volume_fails() -> None:
    info = tarfile.TarInfo("a.jpg")
    info.type, info.size = b"M", 600
    found = look(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024) + tar({"b.jpg": b"1"}))
    assert list(found.places) == ["b.jpg"]
    assert "begins in another volume" in found.failed["a.jpg"].fact


def test_devices_named_like_images_are_counted() -> None:
    info = tarfile.TarInfo("a.jpg")
    info.type = tarfile.FIFOTYPE
    assert look(info.tobuf() + bytes(1024)).skipped == {"special file": 1}


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (tar({"a.jpg": bytes(2000)})[:1500], "ends at byte 1,500 within a member"),
        (tar({"a.jpg": bytes(500)})[:1024], "ends at byte 1,024 without an end mark"),
        (tar({"a.jpg": bytes(500)})[:1600], "ends at byte 1,600 within its end mark"),
        (tar({"a.jpg": b"1"}), None),
    ],
)
def test_what_looks_odd_at_the_end_is_said(data: bytes, note: str | None) -> None:
    found = look(data)
    assert list(found.places) == ["a.jpg"]
    assert found.rest is None
    assert len(found.notes) == (note is not None)
    assert (note or "") in "".join(found.notes)


@pytest.mark.parametrize("zeros", [0, 512, 10240, 5 * 1024 * 1024])
def test_joined_archives_are_read_on(zeros: int) -> None:
    data = tar({"a.jpg": b"1", "x.jpg": b"old"}) + bytes(zeros) + tar({"b.jpg": b"22", "x.jpg": b"newer"})
    found = look(data)
    contents = {name: data[start : start + size] for name, (start, size) in found.places.items()}
    assert contents == {"a.jpg": b"1", "b.jpg": b"22", "x.jpg": b"newer"}
    assert list(found.places) == ["a.jpg", "b.jpg", "x.jpg"]
    assert (found.replaced, found.rest) == (1, None)
    (note,) = found.notes
    begin = 10240 + zeros
    assert (
        f"2 archives one behind another, which are all read: the first ends at byte 2,048, the second begins at byte {begin:,}"
        in note
    )


def test_a_lone_block_of_zeros_is_named() -> None:
    data = tar({"a.jpg": b"1"})[:1024] + bytes(512) + tar({"b.jpg": b"2"})
    found = look(data)
    assert list(found.places) == ["a.jpg", "b.jpg"]
    assert "a lone block of zeros at byte 1,024" in found.notes[0]


@pytest.mark.parametrize("size", [100, 1_000_000])
def test_ordinary_padding_costs_one_request_at_most(size: int) -> None:
    data = tar({f"{n}.jpg": bytes(size) for n in range(5)})
    bare = data[: 5 * (512 + -(-size // 512) * 512)]
    fetchers = [MemoryFetcher({URI: one}) for one in (bare, data)]
    for fetcher in fetchers:
        assert len(index(URI, fetcher, lambda name: True).places) == 5
    assert len(fetchers[1].ranges) <= len(fetchers[0].ranges) + 1


# --- damage ---

NOISE = bytes(range(1, 256)) * 3


@dataclass(frozen=True)
class Written:
    """A member of an archive: its name, its data, and where the first block of its headers and its data are."""

    name: str
    data: bytes
    begin: int
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.data)


@st.composite
def written(draw: st.DrawFn, prefix: str) -> tuple[Archive, list[Written]]:
    """An archive of images with data that is not zero, and what is in it."""
    kind = draw(st.sampled_from(sorted(FORMATS)))
    out = io.BytesIO()
    lengths = draw(st.lists(st.sampled_from([1, 60, 200]), min_size=1, max_size=4))
    with tarfile.open(fileobj=out, mode="w", format=FORMATS[kind]) as archive:
        for number, length in enumerate(lengths):
            # Of 255 bytes at most, cut where a ustar header cuts.
            name = f"{prefix}{number}" + "/n" * (length // 2) + ".jpg"
            if kind == "pax" and draw(st.booleans()):
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
def test_no_member_is_missing_without_a_word(draws: st.DataObject) -> None:
    """Every image before the damage is there; every one that is not there lies behind a byte that a note or a failure names."""
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
    whole = len(data)
    damaged_from = damaged_to = whole
    if draw(st.booleans()):
        place = draw(st.sampled_from(members)).begin
        begin_of_sparse = place
        data = data[:place] + sparse("sparse.jpg") + data[place:]
        members = [m if m.begin < place else Written(m.name, m.data, m.begin + 512, m.start + 512) for m in members]
        whole = damaged_from = damaged_to = len(data)
    else:
        begin_of_sparse = None
    what = draw(st.sampled_from(["nothing", "cut", "noise", "zeros", "rubbish"]))
    if what == "cut":
        damaged_from = draw(st.integers(0, whole))
        data = data[:damaged_from]
        if data.endswith(bytes(1024)):
            # A whole end mark: that another archive was joined to this one nobody can know.
            members = [member for member in members if member.begin < damaged_from]
    elif what in ("noise", "zeros"):
        one = draw(st.sampled_from(members))
        damaged_from = draw(st.sampled_from([one.begin, one.start - 512]))
        damaged_to = damaged_from + 512
        data = data[:damaged_from] + (NOISE[:512] if what == "noise" else bytes(512)) + data[damaged_to:]
    elif what == "rubbish":
        data += NOISE[: draw(st.integers(1, 600))]
    try:
        found = look(Archive(data))
    except RowFailure as exc:
        assert exc.error.stage == "list"
        assert damaged_from < members[0].start
        return
    said = [*found.notes, *([found.rest.fact] if found.rest else [])]
    named = [int(number.replace(",", "")) for text in said for number in re.findall(r"byte ([\d,]+)", text)]
    for member in members:
        place = found.places.get(member.name)
        if member.end <= damaged_from:
            assert place == (member.start, len(member.data)), member
            assert data[member.start : member.end] == member.data
        elif place is None:
            assert min(named, default=whole + 1) <= member.end, member
        elif member.end > len(data):
            assert place == (member.start, len(member.data))  # its row is TRUNCATED
    assert set(found.places) <= {member.name for member in members}
    if begin_of_sparse is not None and begin_of_sparse + 512 <= damaged_from:
        assert list(found.failed) == ["sparse.jpg"]
    if what == "nothing":
        assert found.rest is None
        assert len(found.places) == len(members)
    if what == "rubbish":
        assert found.rest is not None


def test_of_large_members_only_headers_are_read() -> None:
    data = tar({f"{n}.jpg": bytes(1_000_000) for n in range(40)})
    fetcher = MemoryFetcher({URI: data})
    assert len(index(URI, fetcher, lambda name: True).places) == 40
    assert len(fetcher.ranges) <= 42
    assert sum(end - start for start, end in fetcher.ranges) < 0.01 * len(data)


def test_small_members_are_read_through_with_few_requests() -> None:
    data = tar({f"{n}.jpg": bytes(20_000) for n in range(1000)})
    fetcher = MemoryFetcher({URI: data})
    assert len(index(URI, fetcher, lambda name: True).places) == 1000
    assert len(fetcher.ranges) < 25
    assert sum(end - start for start, end in fetcher.ranges) < 1.3 * len(data)


def test_a_file_that_changes_while_it_is_looked_at_is_not_trusted() -> None:
    fetcher = MemoryFetcher({URI: tar({f"{n}.jpg": bytes(1_000_000) for n in range(3)})})
    real = fetcher.fetch_range

    def replaced(uri: str, start: int, end: int) -> object:
        fetcher.etag = str(len(fetcher.ranges))
        return real(uri, start, end)

    fetcher.fetch_range = replaced  # type: ignore[assignment,method-assign]
    with pytest.raises(RowFailure, match="replaced while it was read"):
        index(URI, fetcher, lambda name: True)
