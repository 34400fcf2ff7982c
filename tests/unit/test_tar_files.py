from __future__ import annotations

import gzip
import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_inference.errors import RowFailure, UserError
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
    assert found.notes == []


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
    except UserError as exc:
        # Where even the first header is not whole (its long name is cut), it is no tar file.
        assert "not a tar file" in exc.message
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


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (b"", "a.tar is empty, not a tar file"),
        (b"no tar at all" * 1000, "a.tar is not a tar file"),
        (gzip.compress(tar({"a.jpg": b"1"}), mtime=0), "a.tar is gzip, not a tar file: members of compressed archives"),
        (
            tar({"a.jpg": b"1"})[:1024] + b"rubbish!" * 64 + tar({"b.jpg": b"1"}),
            "damaged at byte 1,024, behind 1 images",
        ),
    ],
)
def test_what_is_no_tar_file_is_refused_with_its_name(data: bytes, fact: str) -> None:
    with pytest.raises(UserError) as caught:
        look(data)
    assert fact in caught.value.message
    assert "s3://b/a.tar" in caught.value.message
    assert caught.value.remedy


def test_sparse_images_are_refused_and_other_sparse_members_are_not() -> None:
    def sparse(name: str) -> bytes:
        info = tarfile.TarInfo(name)
        info.type = tarfile.GNUTYPE_SPARSE
        return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)

    assert look(sparse("a.bin")).skipped == {".bin": 1}
    with pytest.raises(UserError, match=r"a\.jpg is stored as a sparse file"):
        look(sparse("a.jpg"))


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (tar({"a.jpg": bytes(2000)})[:1500], "ends at byte 1,500 within a member"),
        (tar({"a.jpg": bytes(500)})[:1024], "ends at byte 1,024 without an end mark"),
        (tar({"a.jpg": b"1", "b.jpg": b"2"})[:1300], "is cut in the header of a member, behind 1 images"),
        (tar({"a.jpg": b"1"}) + tar({"b.jpg": bytes(2_000_000)}), "behind its end mark"),
        (tar({"a.jpg": b"1"}), None),
    ],
)
def test_what_looks_odd_at_the_end_is_said(data: bytes, note: str | None) -> None:
    found = look(data)
    assert list(found.places) == ["a.jpg"]
    assert len(found.notes) == (note is not None)
    assert (note or "") in "".join(found.notes)


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
