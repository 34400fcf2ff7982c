"""Names are bytes: each is its own input, read by its own name, and shown by its own text."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batch_inference.config import JobConfig, StorageConfig
from batch_inference.errors import RowError, UserError
from batch_inference.inputs.coalesce import plan_reads
from batch_inference.inputs.find import find_inputs
from batch_inference.inputs.listed import OUTPUT_FILES, SPECIAL_FILES
from batch_inference.inputs.listing import expand_location
from batch_inference.storage.fetcher import Fetcher
from batch_inference.storage.names import (
    canonical_name,
    escape_name,
    path_of_text,
    percent_decode,
    text_of_path,
    unescape_name,
)
from batch_inference.storage.spellings import expand_braces
from batch_inference.storage.store import Store
from batch_inference.storage.uris import canonical_uri, display_uri, local_path
from tests.support.containers import tar
from tests.support.images import JOB

# Names of up to 40 bytes out of pieces that an escape could mix up; none is hidden.
PIECES = [
    *(
        b"\\",
        b"x",
        b"\\x",
        b"5c",
        b"\\x5c",
        b"\\xe9",
        b"\xe9",
        b"\xc3",
        b"\xa9",
        "é".encode(),
        "日".encode(),
        b"\\udce9",
        b"\xed\xa0\x80",
    ),
    *(
        b"[",
        b"]",
        b"*",
        b"?",
        b"{a,b}",
        b"{1..3}",
        b"%20",
        b"%",
        b"#",
        b" ",
        b"'",
        b'"',
        b"\n",
        b"\t",
        b"\x1b",
        b"::",
        b"~",
        b"a",
        b"0",
    ),
]
NAMES = st.builds(b"".join, st.lists(st.sampled_from(PIECES), max_size=8)).map(lambda name: b"n" + name + b".jpg")
STORAGE = StorageConfig()


def config(**section: Any) -> JobConfig:
    return JobConfig.model_validate({"input": section})


def inputs(**section: Any) -> list[str]:
    return find_inputs(config(**section)).table["uri"].to_pylist()  # type: ignore[no-any-return]


def refused(given: str) -> UserError:
    with pytest.raises(UserError) as caught:
        find_inputs(config(uris=[given]))
    return caught.value


@contextlib.contextmanager
def folder_of(names: dict[bytes, bytes]) -> Iterator[str]:
    """Create a temporary folder with files of these names and contents."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in names.items():
            with open(os.path.join(os.fsencode(folder), name), "wb") as file:  # noqa: PTH118, PTH123
                file.write(data)
        yield folder


def contents(uris: list[str]) -> list[bytes]:
    return [Fetcher(STORAGE).fetch(uri, 1000) for uri in uris]


def as_uri(folder: str, name: bytes) -> str:
    """Return Python's URI of a file."""
    return Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).as_uri()


# --- the escape ---


@given(st.binary() | NAMES)
@example(b"\\\xe9")
@example(b"\\x\xe9")
@example(b"\\x5\xe9")
@example(b"\\\\xe9\\x5c")
def test_every_name_has_one_text_and_every_text_its_name(name: bytes) -> None:
    text = escape_name(name)
    assert unescape_name(text) == name
    assert canonical_name(text) == text
    text.encode()  # a text that a column can hold


@given(st.text().filter(lambda text: "\\" not in text))
def test_text_without_a_backslash_is_its_own_name(text: str) -> None:
    with contextlib.suppress(UnicodeEncodeError):
        assert escape_name(text.encode()) == text


@given(st.text(alphabet="\\x5ce9é\udce9a"))
def test_texts_of_the_same_name_have_one_spelling(text: str) -> None:
    assert unescape_name(canonical_name(text)) == unescape_name(text)
    assert canonical_name(canonical_name(text)) == canonical_name(text)


def test_path_and_its_text() -> None:
    path = os.fsdecode(b"/d/caf\xe9.jpg")
    assert text_of_path(path) == "/d/caf\\xe9.jpg"
    assert path_of_text("/d/caf\\xe9.jpg") == path
    assert canonical_uri(path) == "file:///d/caf\\xe9.jpg"
    assert local_path(canonical_uri(path)) == path
    assert display_uri(canonical_uri(path)) == "/d/caf\\xe9.jpg"


def test_percent_escapes_are_bytes() -> None:
    assert percent_decode("caf%E9%20.jpg") == "caf\\xe9 .jpg"
    assert percent_decode("caf%C3%A9.jpg") == "café.jpg"
    assert percent_decode("100%.jpg") is None


# --- on disk, in archives, in manifests ---


@settings(max_examples=30)
@given(st.sets(NAMES, min_size=1, max_size=8))
@example({b"caf\xe9.jpg", b"caf\\xe9.jpg", b"caf\\udce9.jpg", b"caf\\x5cxe9.jpg"})
def test_files_of_any_names_are_each_one_input_with_its_own_bytes(names: set[bytes]) -> None:
    with folder_of({name: name for name in names}) as folder:
        uris = inputs(uris=[folder])
        assert len(uris) == len(names)
        assert set(contents(uris)) == names
        for uri, name in zip(uris, contents(uris), strict=True):
            assert uri == f"file://{folder}/{escape_name(name)}"
            # Named alone, as a shell hands it over and as a table shows it, it is the same input.
            assert inputs(uris=[canonical_uri(os.fsdecode(os.fsencode(folder) + b"/" + name))]) == [uri]
            assert inputs(uris=[uri]) == [uri]
            # Python's own URI of it is spelt in another way, which may be another file's name.
            spelt = as_uri(folder, name)
            if spelt.rpartition("/")[2].encode() not in names:
                assert inputs(uris=[spelt]) == [uri]


@settings(max_examples=30)
@given(st.sets(NAMES, min_size=1, max_size=8), st.sampled_from(["uris", "names", "as_uri"]))
@example({b"n .jpg", b"n.jpg "}, "names")
def test_manifest_of_any_names_gives_the_same_inputs(names: set[bytes], kind: str) -> None:
    with folder_of({name: name for name in names}) as folder:
        lines = {
            "uris": [f"file://{folder}/{escape_name(name)}" for name in names],
            "names": [escape_name(name) for name in names],
            "as_uri": [as_uri(folder, name) for name in names],
        }[kind]
        if kind == "as_uri" and any(
            line.rpartition("/")[2].encode() in names - {name} for line, name in zip(lines, names, strict=True)
        ):
            return
        manifest = f"{folder}/m.parquet"
        pq.write_table(pa.table({"uri": lines}), manifest)
        uris = inputs(manifest=manifest)
        assert contents(uris) == list(names)
        assert uris == [f"file://{folder}/{escape_name(name)}" for name in names]


@settings(max_examples=30)
@given(st.sets(NAMES.filter(lambda name: b"/" not in name), min_size=1, max_size=8), st.sampled_from(["gnu", "pax"]))
@example({b"caf\xe9.jpg", b"caf\\xe9.jpg", b"caf\\udce9.jpg"}, "gnu")
def test_members_of_any_names_are_each_one_input_with_their_own_bytes(names: set[bytes], kind: str) -> None:
    with folder_of({}) as folder:
        archive = f"{folder}/a.tar"
        data = tar({name.decode("utf-8", "surrogateescape"): name for name in names}, kind)
        Path(archive).write_bytes(data)
        listed = find_inputs(config(uris=[archive])).table
        uris = [f"file://{archive}#{escape_name(name)}" for name in names]
        assert set(listed["uri"].to_pylist()) == set(uris)
        pq.write_table(pa.table({"uri": uris}), f"{folder}/m.parquet")
        named = find_inputs(config(manifest=f"{folder}/m.parquet")).table
        assert named["uri"].to_pylist() == uris
        places = named.select(["_offset", "_size", "_version", "_column"])
        found = {}
        for run in plan_reads(uris, places, Fetcher(STORAGE), 1000):
            requests = list(run.requests())
            from batch_inference.storage.read_ahead import Answer

            answers = iter([Answer(request.read(), None, 0.0) for request in requests])
            found |= {one.row: bytes(one.data) for one in run.inputs(lambda answers=answers: next(answers))}  # type: ignore[misc]
        assert [found[row] for row in range(len(uris))] == list(names)


def test_name_that_looks_escaped_is_shown_as_to_be_typed(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"stands for the byte"):
        Fetcher(STORAGE).fetch(f"file://{tmp_path}/caf\\xe9.jpg", 10)


def test_names_in_tables_can_be_typed(tmp_path: Path) -> None:
    with folder_of({b"caf\xe9.jpg": b"1"}) as folder:
        assert inputs(uris=[f"{folder}/caf\\xe9.jpg"]) == [f"file://{folder}/caf\\xe9.jpg"]


@pytest.mark.parametrize("name", ["a b %20", "back\\slash \\xe9", "ü#?*[1]"])
def test_output_may_have_any_name_that_is_utf8(name: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path / name), STORAGE)
    store.put("a/b", b"1")
    assert store.create("a/c", b"2") and not store.create("a/c", b"3")
    assert sorted(found.path for found in store.objects()) == ["a/b", "a/c"]
    assert (tmp_path / name / "a/b").is_file()
    assert Store(store.uri, STORAGE).get("a/b") == b"1"


def test_output_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """obstore panics in such folders."""
    with pytest.raises(UserError, match=r"caf\\xe9 is not UTF-8"):
        Store(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"), STORAGE)
    assert list(tmp_path.iterdir()) == []


# --- URIs of files ---


@pytest.mark.parametrize("start", ["file://localhost", "file://LOCALHOST", "file:", "FILE://"])
def test_other_spellings_of_file_uris(start: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"1")
    assert inputs(uris=[f"{start}{tmp_path}/a.jpg"]) == [f"file://{tmp_path}/a.jpg"]
    (tmp_path / "m.txt").write_text(f"{start}{tmp_path}/a.jpg\n")
    assert inputs(manifest=str(tmp_path / "m.txt")) == [f"file://{tmp_path}/a.jpg"]


def test_name_spelt_like_the_uri_comes_before_the_decoded_one(tmp_path: Path) -> None:
    (tmp_path / "a b.jpg").write_bytes(b"decoded")
    uri = f"file://{tmp_path}/a%20b.jpg"
    assert contents(inputs(uris=[uri])) == [b"decoded"]
    (tmp_path / "a%20b.jpg").write_bytes(b"literal")
    assert contents(inputs(uris=[uri])) == [b"literal"]
    (tmp_path / "m.txt").write_text(uri)
    assert contents(inputs(manifest=str(tmp_path / "m.txt"))) == [b"literal"]
    # A path is no URI, and nothing in it is decoded.
    (tmp_path / "a%20b.jpg").unlink()
    assert "there is no file" in refused(str(tmp_path / "a%20b.jpg")).message


def test_folder_an_archive_and_a_glob_by_uris_with_percent_escapes(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "1.jpg").write_bytes(b"1")
    (folder / "t.tar").write_bytes(tar({"x y.jpg": b"2"}))
    base = f"file://{tmp_path}/a%20b"
    assert inputs(uris=[base])[0] == f"file://{folder}/1.jpg"
    assert inputs(uris=[f"{base}/*.jpg"]) == [f"file://{folder}/1.jpg"]
    assert inputs(uris=[f"{base}/t.tar#x%20y.jpg"]) == [f"file://{folder}/t.tar#x y.jpg"]


def test_decoding_leads_to_no_forbidden_location(tmp_path: Path) -> None:
    from batch_inference.inputs.allowlist import Allowlist

    (tmp_path / "in").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"1")
    (tmp_path / "m.txt").write_text(
        f"file://{tmp_path}/in/%2e%2e/secret.jpg\nfile://{tmp_path}/in/\\x2e\\x2e/secret.jpg\n"
    )
    section = config(manifest=str(tmp_path / "m.txt"), allowed_prefixes=[f"{tmp_path}/in"]).input
    prefixes = Allowlist.from_config(section)
    assert prefixes
    for uri in inputs(manifest=str(tmp_path / "m.txt"), allowed_prefixes=[f"{tmp_path}/in"]):
        refusal = prefixes.refusal(uri)
        assert refusal and refusal.error_type == "NOT_ALLOWED"


def test_lines_that_find_writes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.jpg").write_bytes(b"1")
    (tmp_path / "m.txt").write_text("./sub/a.jpg\nsub/a.jpg\n")
    assert inputs(manifest=str(tmp_path / "m.txt")) == [f"file://{tmp_path}/sub/a.jpg"]


def test_spaces_around_a_line_belong_to_the_name_only_if_it_exists(tmp_path: Path) -> None:
    (tmp_path / "a.jpg ").write_bytes(b"1")
    (tmp_path / "b.jpg").write_bytes(b"2")
    (tmp_path / "m.csv").write_text("uri,n\na.jpg ,1\nb.jpg ,2\n")
    assert contents(inputs(manifest=str(tmp_path / "m.csv"))) == [b"1", b"2"]


# --- locations of other tools ---


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("abfss://c@acc.dfs.core.windows.net/p/a b.jpg", "az://c/p/a b.jpg"),
        ("abfs://c@acc.dfs.core.windows.net/p", "az://c/p"),
        ("wasbs://c@acc.blob.core.windows.net/p", "az://c/p"),
        ("WASB://c@ACC.blob.core.windows.net/p", "az://c/p"),
        ("abfs://c/p", "az://c/p"),
    ],
)
def test_azure_uris_of_the_environments_account_are_read(
    given: str, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "acc")
    assert canonical_uri(given) == written
    if "@" in given:
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "other")
        with pytest.raises(
            UserError, match="in the storage account acc, and AZURE_STORAGE_ACCOUNT_NAME is other"
        ) as caught:
            canonical_uri(given)
        assert "AZURE_STORAGE_ACCOUNT_NAME=acc" in caught.value.remedy
        assert written in caught.value.remedy


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("https://acc.blob.core.windows.net/c/p/a%20b.jpg", "az://c/p/a b.jpg and set AZURE_STORAGE_ACCOUNT_NAME=acc."),
        ("https://bucket.s3.eu-west-1.amazonaws.com/k/a.jpg", "s3://bucket/k/a.jpg and set AWS_REGION=eu-west-1."),
        ("https://my.bucket.s3.amazonaws.com/k/a.jpg", "s3://my.bucket/k/a.jpg."),
        ("https://s3.us-west-2.amazonaws.com/bucket/k", "s3://bucket/k and set AWS_REGION=us-west-2."),
        ("https://s3-us-gov-west-1.amazonaws.com/bucket/k", "s3://bucket/k and set AWS_REGION=us-gov-west-1."),
        ("https://bucket.s3.dualstack.eu-west-1.amazonaws.com/k", "s3://bucket/k and set AWS_REGION=eu-west-1."),
        ("https://bucket.s3-accelerate.amazonaws.com/k", "s3://bucket/k."),
        ("https://storage.googleapis.com/bucket/k", "gs://bucket/k."),
        ("https://bucket.storage.googleapis.com/k", "gs://bucket/k."),
        ("https://storage.cloud.google.com/bucket/k", "gs://bucket/k."),
        ("https://example.org/k", "Use a local path or one of file://"),
        ("https://[broken/k", "Use a local path or one of file://"),
        ("pipe:aws s3 cp s3://b/x-{000..099}.tar -", "Write s3://b/x-{000..099}.tar alone."),
        ("pipe:cat /data/x.tar", "Write the location of the file alone"),
        ("abfss://c@onelake.dfs.fabric.microsoft.com/p", "Write az://CONTAINER/PATH"),
    ],
)
def test_other_locations_are_refused_with_the_line_that_works(given: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        canonical_uri(given)
    assert line in caught.value.remedy


def test_signed_address_is_not_repeated() -> None:
    with pytest.raises(UserError) as caught:
        canonical_uri("https://b.s3.amazonaws.com/k.jpg?X-Amz-Signature=hunter2")
    assert "hunter2" not in str(caught.value) + caught.value.remedy
    assert "s3://b/k.jpg." in caught.value.remedy


# --- patterns ---


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("{000000..000002}.tar", ["000000.tar", "000001.tar", "000002.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}-{1..2}.x", ["a-1.x", "a-2.x", "b-1.x", "b-2.x"]),
        ("{a,}x", ["ax", "x"]),
        ("{a}{}", ["{a}{}"]),
        ("x", ["x"]),
    ],
)
def test_braces_stand_for_names_as_in_a_shell(given: str, names: list[str]) -> None:
    assert expand_braces(given) == names


def test_braces_have_a_limit() -> None:
    with pytest.raises(UserError, match="more than 100,000 names"):
        expand_braces("{0..999999999999}")
    with pytest.raises(UserError, match="more than 100,000 names"):
        expand_braces("{0..999}{0..999}")


def test_braces_in_local_locations(tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar", "2.tar"):
        (tmp_path / name).write_bytes(tar({f"{name}.jpg": b"1"}))
    assert len(inputs(uris=[f"{tmp_path}/{{0..2}}.tar"])) == 3
    assert "nothing was found" in refused(f"{tmp_path}/{{a,b}}*.tar").message
    assert "there is no file or folder" in refused(f"{tmp_path}/{{0..3}}.tar").message
    (tmp_path / "{0..2}.tar").write_bytes(tar({"literal.jpg": b"1"}))
    assert inputs(uris=[f"{tmp_path}/{{0..2}}.tar"]) == [f"file://{tmp_path}/{{0..2}}.tar#literal.jpg"]


def test_joined_locations_are_refused_with_the_line_that_works(tmp_path: Path) -> None:
    error = refused(f"{tmp_path}/a.tar::{tmp_path}/b.tar")
    assert "joins 2 locations with '::'" in error.message
    assert f"'{tmp_path}/a.tar' '{tmp_path}/b.tar'" in error.remedy
    (tmp_path / "a::b.jpg").write_bytes(b"1")
    assert expand_location(f"file://{tmp_path}/a::b.jpg", STORAGE) == [f"file://{tmp_path}/a::b.jpg"]


def test_beginning_of_a_name_is_refused_with_a_glob(tmp_path: Path) -> None:
    (tmp_path / "2024-01.jpg").write_bytes(b"1")
    assert refused(f"{tmp_path}/2024-").remedy == f"Names begin so; write {tmp_path}/2024-* for them."


# --- what is no image's file ---


def specials(folder: Path) -> dict[str, str]:
    """Create special files; return them by their name in messages."""
    os.mkfifo(folder / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.jpg"))
    (folder / "device.jpg").symlink_to("/dev/zero")
    return {"fifo.jpg": "a FIFO", "socket.jpg": "a socket", "device.jpg": "a device"}


def test_special_files_are_left_out_and_counted(tmp_path: Path) -> None:
    special = specials(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"1")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for place in (str(tmp_path), f"{tmp_path}/*.jpg", f"{tmp_path}/**"):
        found = find_inputs(config(uris=[place]))
        names = [Path(uri).name for uri in found.table["uri"].to_pylist()]
        assert names == ["a.jpg", "link.jpg", "loop.jpg", "nowhere.jpg"]
        assert found.skipped == {SPECIAL_FILES: 3}
    for name, what in special.items():
        assert f"is {what}, not a regular file" in refused(str(tmp_path / name)).message


def test_special_files_in_a_manifest_fail_at_once(tmp_path: Path) -> None:
    for name, what in specials(tmp_path).items():
        for read in (
            lambda uri: Fetcher(STORAGE).fetch(uri, 1000),
            lambda uri: Fetcher(STORAGE).fetch_range(uri, 0, 10),
        ):
            with pytest.raises(RowError, match=re.escape(f"this is {what}, not a regular file")) as caught:
                read(f"file://{tmp_path}/{name}")
            assert caught.value.error.error_type == "INVALID_URI"
            assert not caught.value.error.retryable


def test_files_without_a_size_are_read_within_the_limit() -> None:
    uri = "file:///proc/self/status"
    whole = Fetcher(STORAGE).fetch(uri, 1_000_000)
    assert b"Name:" in whole
    with pytest.raises(RowError, match=r"more bytes than preprocess\.max_bytes = 100") as caught:
        Fetcher(STORAGE).fetch(uri, 100)
    assert caught.value.error.error_type == "TOO_LARGE"


def test_file_without_bytes_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    assert Fetcher(STORAGE).fetch(f"file://{tmp_path}/a.jpg", 0) == b""


def output(folder: Path) -> int:
    """Make an output with the user's images in it; return the number of the job's files."""
    names = [
        "_job.json",
        "_manifest/shard-00000.parquet",
        "predictions/a.parquet",
        "errors/b.jpg",
        "_report/images/c.jpg",
    ]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(JOB if name == "_job.json" else b"1")
    return len(names)


@pytest.mark.parametrize("place", ["out", "deep/er/out", "."])
@pytest.mark.parametrize("glob", ["", "/**"])
def test_output_among_the_inputs_is_left_out_and_counted(place: str, glob: str, tmp_path: Path) -> None:
    files = output(tmp_path / place) + output(tmp_path / "second")
    (tmp_path / "a.jpg").write_bytes(b"1")
    (tmp_path / place / "user.jpg").write_bytes(b"1")
    (tmp_path / "predictions").mkdir(exist_ok=True)
    found = find_inputs(config(uris=[f"{tmp_path}{glob}"], extensions=[]))
    uris = {uri.removeprefix(f"file://{tmp_path}/") for uri in found.table["uri"].to_pylist()}
    assert uris == {"a.jpg", f"{place}/user.jpg".removeprefix("./")}
    assert found.skipped == {OUTPUT_FILES: files}


def test_folders_named_like_output_folders_are_listed(tmp_path: Path) -> None:
    for name in ("predictions/a.jpg", "errors/b.jpg", "_manifest/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    for job in (b"", b"[]", b"{}", b"not json"):
        (tmp_path / "_job.json").write_bytes(job)
        assert len(inputs(uris=[str(tmp_path)])) == 3


def test_files_of_an_output_can_be_named(tmp_path: Path) -> None:
    output(tmp_path)
    assert inputs(uris=[f"{tmp_path}/errors/*.jpg"]) == [f"file://{tmp_path}/errors/b.jpg"]
    assert inputs(uris=[f"{tmp_path}/errors"]) == [f"file://{tmp_path}/errors/b.jpg"]


def test_unreadable_line_says_what_to_write() -> None:
    (run,) = plan_reads(["https://acc.blob.core.windows.net/c/a.jpg"], None, Fetcher(STORAGE), 1000)
    (request,) = run.requests()
    with pytest.raises(
        RowError, match=r"not supported\. Write az://c/a\.jpg and set AZURE_STORAGE_ACCOUNT_NAME=acc\."
    ) as caught:
        request.read()
    assert (caught.value.error.stage, caught.value.error.error_type) == ("list", "INVALID_URI")
