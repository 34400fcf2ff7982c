"""Listing a bucket: keys of any form; each is a row or counted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from batch_inference.config import JobConfig
from batch_inference.errors import RowError, UserError
from batch_inference.inputs.bucket_listing import _before
from batch_inference.inputs.find import Inputs, find_inputs
from batch_inference.inputs.listed import FOLDER_MARKERS, OUTPUT_FILES
from batch_inference.storage.fetcher import Fetcher
from batch_inference.storage.store import key_problem
from tests.support.containers import tar
from tests.support.images import JOB
from tests.support.stub_s3 import Answer, StubS3, stub_s3


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)


@pytest.fixture
def stub() -> Iterator[StubS3]:
    with stub_s3({}) as running:
        yield running


def put(stub: StubS3, *keys: str) -> None:
    """Add objects whose content is their key; a key that ends with a slash has none."""
    stub.objects |= {key: b"" if key.endswith("/") else key.encode() for key in keys}


def find(stub: StubS3, *uris: str, **options: Any) -> Inputs:
    return find_inputs(
        JobConfig.model_validate({"input": {"uris": [f"s3://bkt/{uri}" for uri in uris], **options}}).model_copy(
            update={"storage": stub.storage}
        )
    )


def keys(inputs: Inputs) -> list[str]:
    return [uri.removeprefix("s3://bkt/") for uri in inputs.table["uri"].to_pylist()]


def refused(stub: StubS3, *uris: str, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        find(stub, *uris, **options)
    return caught.value


# --- literally first ---


def test_existing_name_is_not_read_as_a_pattern(stub: StubS3) -> None:
    put(
        stub,
        "run[1]/a.jpg",
        "run1/a.jpg",
        "photo (1)[a].jpg",
        "photo (1)a.jpg",
        "what?.jpg",
        "what1.jpg",
        "*/a.jpg",
        "x/a.jpg",
    )
    assert keys(find(stub, "run[1]/a.jpg")) == ["run[1]/a.jpg"]
    assert keys(find(stub, "run[1]/")) == ["run[1]/a.jpg"]
    assert keys(find(stub, "run[1]")) == ["run[1]/a.jpg"]
    assert keys(find(stub, "photo (1)[a].jpg")) == ["photo (1)[a].jpg"]
    assert keys(find(stub, "what?.jpg")) == ["what?.jpg"]
    assert keys(find(stub, "*")) == ["*/a.jpg"]
    assert keys(find(stub, "run[[]1]/*")) == ["run[1]/a.jpg"]
    assert keys(find(stub, "run[1-9]/a.jpg")) == ["run1/a.jpg"]
    assert keys(find(stub, "what[?1].jpg")) == ["what1.jpg", "what?.jpg"]


def test_manifest_folder_of_an_odd_name_is_not_read_as_a_pattern(stub: StubS3) -> None:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    for folder in ("run[1]", "run1"):
        sink = io.BytesIO()
        pq.write_table(pa.table({"uri": [f"s3://bkt/{folder}.jpg"]}), sink)
        stub.objects[f"{folder}/part.parquet"] = sink.getvalue()
    config = JobConfig.model_validate({"input": {"manifest": "s3://bkt/run[1]/"}}).model_copy(
        update={"storage": stub.storage}
    )
    assert find_inputs(config).table["uri"].to_pylist() == ["s3://bkt/run[1].jpg"]


def test_object_that_is_named_is_that_object(stub: StubS3) -> None:
    put(stub, "x.jpg", "x.jpg/thumbnail.jpg")
    assert keys(find(stub, "x.jpg")) == ["x.jpg"]
    assert keys(find(stub, "x.jpg/")) == ["x.jpg/thumbnail.jpg"]


def test_braces_in_keys(stub: StubS3) -> None:
    stub.objects = {f"d/{n:06}.tar": tar({f"{n}.jpg": b"1"}) for n in range(3)}
    assert keys(find(stub, "d/{000000..000002}.tar")) == [f"d/{n:06}.tar#{n}.jpg" for n in range(3)]
    assert "nothing was found in s3://bkt/d/000003.tar" in refused(stub, "d/{000002..000003}.tar").message
    put(stub, "{a,b}.jpg")
    assert keys(find(stub, "{a,b}.jpg")) == ["{a,b}.jpg"]


def test_joined_locations_are_answered_with_the_line_that_works(stub: StubS3) -> None:
    error = refused(stub, "a.tar::s3://bkt/b.tar")
    assert error.remedy == "Write them one after another: 's3://bkt/a.tar' 's3://bkt/b.tar'."


# --- odd keys ---

ODD = ["p//b.jpg", "p/./d.jpg", "p/../e.jpg", "p/https://h/f.jpg", "p/x//", "p/.jpg/../g.jpg"]


@pytest.mark.parametrize("odd", [*([key] for key in ODD), ODD])
def test_odd_key_is_a_row_and_the_others_are_inputs(odd: list[str], stub: StubS3) -> None:
    even = ["p/ .jpg", "p/(1).jpg", "p/a.jpg", "p/c.jpg", "p/sub/h.jpg", "p/z.jpg"]
    put(stub, *even, *odd, "q.jpg")
    inputs = keys(find(stub, "p/"))
    rows = [key for key in odd if key.endswith(".jpg") and "/.jpg/" not in key]
    assert inputs == sorted([*even, *rows])
    fetcher = Fetcher(stub.storage)
    for key in inputs:
        if key in odd:
            with pytest.raises(RowError, match="cannot be asked for; copy the object") as caught:
                fetcher.fetch(f"s3://bkt/{key}", 1000)
            assert caught.value.error.error_type == "INVALID_URI"
        else:
            assert fetcher.fetch(f"s3://bkt/{key}", 1000) == key.encode()


def test_odd_key_behind_many_pages(stub: StubS3) -> None:
    many = [f"p/{n:05}.jpg" for n in range(2500)]
    put(stub, *many, "p/02400/../a.jpg")
    assert keys(find(stub, "p/")) == sorted([*many, "p/02400/../a.jpg"])


def test_folder_without_a_name_can_be_named(stub: StubS3) -> None:
    put(stub, "p//b.jpg", "p/a.jpg", "p//c/d.jpg")
    assert keys(find(stub, "p//")) == ["p//b.jpg", "p//c/d.jpg"]
    assert keys(find(stub, "p//b.jpg")) == ["p//b.jpg"]
    assert keys(find(stub, "p//*.jpg")) == ["p//b.jpg"]
    error = refused(stub, "/p/")
    assert "begins with a slash after its bucket" in error.message
    assert "s3://bkt/p/" in error.remedy


@pytest.mark.parametrize("others", [["a.jpg"], ["0.jpg", "b.jpg"], ["0.jpg", "a.jpg", "a/b.jpg"]])
def test_key_that_begins_with_a_slash_is_no_other_key(others: list[str], stub: StubS3) -> None:
    put(stub, "/a.jpg", *others)
    assert keys(find(stub, "")) == ["/a.jpg", *others]


def test_key_is_not_read_as_another_one(stub: StubS3) -> None:
    put(stub, "a.jpg")
    for key in ("/a.jpg", "a.jpg/", "./a.jpg", "x/../a.jpg", "//a.jpg"):
        with pytest.raises(RowError, match="cannot be asked for"):
            Fetcher(stub.storage).fetch(f"s3://bkt/{key}", 1000)


def test_odd_key_that_no_client_lists_is_named_with_a_remedy(monkeypatch: pytest.MonkeyPatch, stub: StubS3) -> None:
    from pyarrow import fs

    def broken(*args: Any, **options: Any) -> None:
        raise OSError("no such client")

    monkeypatch.setattr(fs, "S3FileSystem", broken)
    put(stub, "p//b.jpg", "p/a.jpg")
    error = refused(stub, "p/")
    assert 'cannot list s3://bkt/p to its end: Path "p//b.jpg"' in error.message
    assert "--manifest" in error.remedy


PARTS = st.sampled_from(
    [
        *(
            "",
            ".",
            "..",
            "a",
            "b.jpg",
            "[1]",
            "*",
            "?",
            " ",
            "#",
            "%20",
            "+",
            "é",
            "日",
            "{a,b}",
            "{1..2}",
            "a~",
            "(1)",
            "-",
        ),
        *("\\x41", "&", "'", '"', "<b>"),
    ]
)
KEYS = st.builds(
    lambda folders, name: "/".join(["p", *folders, f"n{name}.jpg"]),
    st.lists(PARTS, max_size=3),
    PARTS.filter("b.jpg".__ne__),
)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.sets(KEYS, min_size=1, max_size=6), st.sampled_from([1000, 3]), st.booleans())
@example({"p/a//n.jpg", "p/a/n.jpg", "p/n.jpg"}, 1, False)
def test_keys_of_any_form_are_each_one_input(stub: StubS3, given_keys: set[str], page: int, in_folders: bool) -> None:
    stub.objects = {key: key.encode() for key in given_keys}
    stub.page, stub.in_folders = page, in_folders
    inputs = keys(find(stub, "p"))
    assert inputs == sorted(given_keys)
    fetcher = Fetcher(stub.storage)
    for key in inputs:
        if not key_problem(key):
            assert fetcher.fetch(f"s3://bkt/{key}", 1000) == key.encode()
    # Named alone, it is the same input.
    for key in inputs[:2]:
        assert keys(find(stub, key)) == [key]


# --- folder markers ---


def test_folder_markers_are_counted(stub: StubS3) -> None:
    put(stub, "p/", "p/sub/", "p/sub/a.jpg", "p/b.jpg", "p/v1.2/", "p/x.jpg/")
    stub.objects |= {"p/x_$folder$": b"", "p/empty.jpg": b"", "p/x.jpg": b"1"}
    for extensions in ([], [".jpg"]):
        inputs = find(stub, "p/", extensions=extensions)
        assert keys(inputs) == ["p/b.jpg", "p/empty.jpg", "p/sub/a.jpg", "p/x.jpg"]
        assert inputs.skipped == {FOLDER_MARKERS: 5}
        assert inputs.duplicates == 0


def test_folder_of_markers_alone_says_so(stub: StubS3) -> None:
    put(stub, "p/", "p/sub/")
    assert "only 2 folder markers" in refused(stub, "p/").message


# --- beginnings of names ---


@pytest.mark.parametrize("in_folders", [False, True])
def test_glob_lists_from_its_literal_beginning(in_folders: bool, stub: StubS3) -> None:
    stub.in_folders, stub.page = in_folders, 1000
    before = [f"p/2023-{n:05}.jpg" for n in range(3000)]
    after = [f"p/2025-{n:05}.jpg" for n in range(3000)]
    wanted = ["p/2024-.jpg", "p/2024-01.jpg", "p/2024-é.jpg", "p/2024-~.jpg"]
    put(stub, *before, *after, *wanted, "p/2024/x.jpg", "p/2024.jpg", "p/2024-01/deep.jpg")
    assert keys(find(stub, "p/2024-*")) == sorted(wanted)
    assert len([query for query in stub.listings if query["prefix"] == "p/"]) == 1
    assert keys(find(stub, "p/2024-**")) == sorted([*wanted, "p/2024-01/deep.jpg"])
    assert keys(find(stub, "p/2024*.jpg")) == sorted([*wanted, "p/2024.jpg"])


@pytest.mark.parametrize("begin", ["a", "p/0", "p/.", "p/..", "p/ ", "p/\ue000", "p/a/", "p/!", "0", "é"])
def test_offset_of_a_listing_is_just_before_the_beginning(begin: str) -> None:
    before = _before(begin)
    if before is not None:
        assert not key_problem(before)
        assert before.encode() < begin.encode()


@pytest.mark.parametrize(
    ("key", "line"), [("p/2024-01.jpg", "s3://bkt/p/2024-* for"), ("p/2024-01/a.jpg", "s3://bkt/p/2024-*/** for")]
)
def test_beginning_of_a_key_is_answered_with_a_glob(key: str, line: str, stub: StubS3) -> None:
    put(stub, key, "p/2023.jpg", "p/2025.jpg")
    error = refused(stub, "p/2024-")
    assert "there is no object and no folder s3://bkt/p/2024-" in error.message
    assert line in error.remedy
    assert keys(find(stub, line.removeprefix("s3://bkt/").removesuffix(" for"))) == [key]
    assert "nothing was found" in refused(stub, "p/2026-").message


# --- outputs ---


@pytest.mark.parametrize("given", ["", "**"])
@pytest.mark.parametrize("folder", ["out/", "a/b/out/", ""])
def test_output_among_the_inputs_is_left_out_and_counted(folder: str, given: str, stub: StubS3) -> None:
    put(
        stub,
        "a.jpg",
        f"{folder}user.jpg",
        f"{folder}predictions/x.parquet",
        f"{folder}_report/a.jpg",
        f"{folder}errors/a.jpg",
    )
    put(stub, f"{folder}_commits/shard-00000.json", "z/predictions/b.jpg", "z/_manifest/c.jpg")
    stub.objects[f"{folder}_job.json"] = JOB
    inputs = find(stub, given, extensions=[])
    assert keys(inputs) == sorted({"a.jpg", f"{folder}user.jpg", "z/predictions/b.jpg", "z/_manifest/c.jpg"})
    assert inputs.skipped == {OUTPUT_FILES: 5}


# --- what the store says ---


def test_store_that_denies_heads_is_listed_all_the_same(stub: StubS3) -> None:
    put(stub, "p/a[1].jpg", "p/a1.jpg")
    stub.answer = lambda request: Answer(403, "AccessDenied") if request.method == "HEAD" else None
    assert keys(find(stub, "p/a[1].jpg")) == ["p/a1.jpg"]
    assert keys(find(stub, "p/")) == ["p/a1.jpg", "p/a[1].jpg"]


def test_key_that_is_not_utf8_is_refused() -> None:
    from batch_inference.storage.uris import canonical_uri

    with pytest.raises(UserError, match="not UTF-8"):
        canonical_uri("s3://bkt/" + os.fsdecode(b"caf\xe9.jpg"))
