from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, ValidationError

from batch_inference import config as config_module
from batch_inference.config import InputConfig, JobConfig, json_schema, load_config, parse_config
from batch_inference.errors import UserError

SCHEMA = jsonschema.Draft202012Validator(json_schema())


def refused(data: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(data)
    assert caught.value.remedy
    return caught.value.message


def test_defaults_are_those_of_the_contract() -> None:
    assert JobConfig().model_dump(mode="json") == {
        "input": {
            "uris": [],
            "manifest": None,
            "uri_column": "uri",
            "allowed_prefixes": None,
            "image_column": None,
            "passthrough_columns": [],
            "extensions": [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"],
            "recursive": True,
            "limit": None,
            "sample": None,
            "sample_seed": 0,
        },
        "output": {"uri": "", "compression": "zstd"},
        "storage": {
            "endpoint_url": None,
            "region": None,
            "anonymous": False,
            "timeout_s": 60,
            "max_retries": 5,
            "retry_timeout_s": 120,
            "fetch_concurrency": 16,
        },
        "model": {
            "source": "torchvision",
            "name": "resnet152",
            "weights": "DEFAULT",
            "args": [],
            "sha256": None,
            "labels": None,
            "transform": None,
        },
        "predictor": None,
        "task": "classify",
        "inference": {
            "actors": 4,
            "gpus_per_actor": 1,
            "cpus_per_actor": 1,
            "device": "auto",
            "batch_size": "auto",
            "precision": "auto",
            "compile": "auto",
            "top_k": 5,
            "embedding_dtype": "float32",
        },
        "preprocess": {
            "cpus_per_task": 1,
            "decoder": "fast",
            "damaged": "error",
            "exif_orientation": True,
            "max_pixels": 178956970,
            "decode_timeout_s": 120,
            "decode_memory_mib": 4096,
            "max_bytes": 268435456,
        },
        "errors": {"max_count": None, "max_percent": 5.0, "min_rows": 1000},
        "preflight": {"enabled": False, "samples": 64, "golden_manifest": None, "golden_tolerance": 0.02},
        "report": {"enabled": True, "thumbnails": 18, "gpu_hour_price": None, "currency": "USD"},
        "shard_size": 1000,
    }


FULL: dict[str, Any] = {
    "input": {"uris": ["s3://b/ü\n x/", "photos/*.jpg"], "extensions": ["JPG", ".Png"], "recursive": False, "limit": 7},
    "output": {"uri": "out: #1", "compression": "none"},
    "storage": {"endpoint_url": "http://localhost:1", "anonymous": True, "timeout_s": 0.5, "max_retries": 0},
    "model": {
        "source": "file",
        "name": "timm/x",
        "weights": "w.pt",
        "labels": ["a", "on", "null"],
        "sha256": "0" * 64,
        "transform": {"resize": 8, "crop": 8, "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bicubic"},
    },
    "predictor": {"path": "a.b:C.D", "args": [1, "x", None, {"y": [True]}], "kwargs": {"device": "cpu"}},
    "inference": {"actors": 2, "gpus_per_actor": 0.25, "batch_size": 8, "compile": False, "precision": "bfloat16"},
    "preprocess": {"decoder": "exact", "cpus_per_task": 0.5},
    "errors": {"max_count": 0, "max_percent": None},
    "shard_size": 3,
}


@pytest.mark.parametrize("data", [{}, FULL, {"input": {"manifest": "007"}, "predictor": "m:C"}])
def test_yaml_round_trip_gives_an_equal_configuration(data: dict[str, Any], tmp_path: Path) -> None:
    config = parse_config(data)
    file = tmp_path / "job.yaml"
    file.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(str(file)) == config
    assert JobConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_extensions_get_their_dot_and_lose_their_case() -> None:
    assert parse_config({"input": {"extensions": ["JPG", ".Png", "tar.GZ"]}}).input.extensions == (
        ".jpg",
        ".png",
        ".tar.gz",
    )


def test_settings_win_over_overrides_and_those_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("inference: {actors: 1, top_k: 1, batch_size: 1}\ninput: {uris: [a, b]}\n")
    config = load_config(
        str(file),
        {"inference": {"actors": 2, "top_k": 2, "batch_size": None}, "input": {"uris": None, "manifest": None}},
        ["inference.actors=3"],
    )
    assert (config.inference.actors, config.inference.top_k, config.inference.batch_size) == (3, 2, 1)
    assert config.input.uris == ("a", "b")


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("shard_size=5", "shard_size", 5),
        ("errors.max_percent=null", "errors.max_percent", None),
        ("input.uris=[a, s3://b/c]", "input.uris", ("a", "s3://b/c")),
        ("output.uri=s3://b/x=y", "output.uri", "s3://b/x=y"),
        ("output.uri=", "output.uri", ""),
        ("preprocess.exif_orientation=false", "preprocess.exif_orientation", False),
        ("preprocess.decoder=exact", "preprocess.decoder", "exact"),
        ("inference.batch_size=auto", "inference.batch_size", "auto"),
        ("inference.gpus_per_actor=0", "inference.gpus_per_actor", 0),
        ("predictor=my_module:Mine", "predictor.path", "my_module:Mine"),
        ("model.transform.resize=10", "model.transform.resize", 10),
    ],
)
def test_settings_are_read_as_yaml(setting: str, path: str, value: object) -> None:
    found: Any = load_config(None, None, [setting])
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_settings_add_arguments_to_a_predictor_given_as_text() -> None:
    config = load_config(None, {"predictor": "m:C"}, ["predictor.args=[1]", "predictor.kwargs.a=b"])
    assert config.predictor is not None
    assert (config.predictor.path, config.predictor.args, config.predictor.kwargs) == ("m:C", (1,), {"a": "b"})


@pytest.mark.parametrize("setting", ["actors", "=3", ""])
def test_settings_without_key_or_value_are_refused(setting: str) -> None:
    with pytest.raises(UserError, match="key=value") as caught:
        load_config(None, None, [setting])
    assert "--set inference.actors=2" in caught.value.remedy


def test_problems_are_named_all_at_once_with_key_and_value() -> None:
    message = refused(
        {
            "inference": {"actors": 0, "gpus_per_actor": 1.5, "batch_siez": 3, "precision": "int8"},
            "outptu": {},
            "predictor": "no colon",
            "input": {"uris": ["a"], "manifest": "b"},
            "errors": {"max_percent": 101, "nonsense": 1},
            "shard_size": "many",
            "model": {"sha256": "abc", "transform": {"reseize": 1}},
        }
    )
    first, *lines = message.split("\n  - ")
    assert first == "12 problems in the configuration:"
    assert len(lines) == 12
    found = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines}
    assert found["inference.actors"] == "input should be greater than or equal to 1 (given: 0)"
    assert found["inference.gpus_per_actor"].startswith("1.5 is neither a fraction of one GPU nor a whole number")
    assert found["inference.batch_siez"] == "there is no such key; did you mean 'batch_size'?"
    assert "'float32', 'bfloat16' or 'float16' (given: 'int8')" in found["inference.precision"]
    assert found["outptu"] == "there is no such key; did you mean 'output'?"
    assert "such as my_module:MyPredictor" in found["predictor.path"]
    assert "both uris and manifest are given" in found["input"]
    assert found["errors.max_percent"].endswith("less than or equal to 100 (given: 101)")
    assert found["errors.nonsense"] == "there is no such key; known here: max_count, max_percent, min_rows"
    assert found["shard_size"].endswith("(given: 'many')")
    assert "string should match pattern" in found["model.sha256"]
    assert found["model.transform.reseize"] == "there is no such key; did you mean 'resize'?"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 2.5])
def test_gpus_are_a_fraction_of_one_or_whole(value: float) -> None:
    assert "inference.gpus_per_actor" in refused({"inference": {"gpus_per_actor": value}})


def test_keys_of_earlier_versions_are_refused_with_their_new_names() -> None:
    message = refused(
        {
            "input": {"uris": ["a"], "bytes_column": "a: b"},
            "preprocess": {"exact": True, "gpu_jpeg": False},
            "errors": {"min_sample": 7},
            "preflight": {"golden": "s3://b/golden.parquet"},
        }
    )
    assert message.split("\n  - ") == [
        "5 problems in the configuration:",
        "input.bytes_column: this key has a new name; write input.image_column: 'a: b'",
        "preprocess.exact: this key has a new name; write preprocess.decoder: exact",
        "preprocess.gpu_jpeg: this key has a new name; write preprocess.decoder: exact",
        "errors.min_sample: this key has a new name; write errors.min_rows: 7",
        "preflight.golden: this key has a new name; write preflight.golden_manifest: s3://b/golden.parquet",
    ]


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"exact": False}, "write preprocess.decoder: fast"),
        ({"gpu_jpeg": False}, "write preprocess.decoder: fast"),
        ({"gpu_jpeg": True}, "write preprocess.decoder: gpu"),
        ({"exact": True, "gpu_jpeg": True}, "write preprocess.decoder: exact or preprocess.decoder: gpu"),
        (
            {"exact": True, "decoder": "fast"},
            "this key is now preprocess.decoder, which is given too; remove preprocess.exact",
        ),
    ],
    ids=str,
)
def test_decoder_replaces_two_keys(given: dict[str, Any], remedy: str) -> None:
    lines = refused({"preprocess": given}).split("\n  - ")[1:]
    assert len(lines) == len(given.keys() - {"decoder"})
    assert all(line.endswith(remedy) for line in lines)


def test_setting_of_an_earlier_version_is_refused_with_its_new_name() -> None:
    with pytest.raises(UserError, match=r"errors\.min_sample: this key has a new name; write errors\.min_rows: 5$"):
        load_config(None, None, ["errors.min_sample=5"])


def test_renamed_keys_are_unknown_and_their_new_names_known() -> None:
    known = JobConfig().model_dump()
    for old, new in config_module.RENAMED_KEYS.items():
        (section, key), (new_section, new_key) = old.split("."), new.split(".")
        assert key not in known[section]
        assert new_key in known[new_section]


def test_single_problem_is_counted_as_one() -> None:
    assert refused({"shard_size": 0}).startswith("1 problem in the configuration:\n  - shard_size: ")


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"- a\n- b\n", "holds a list, not keys and values"),
        (b"input: [unclosed\n", "is not valid YAML"),
        (b"input: \xff\xfe\n", "cannot read"),
        (None, "no configuration file at"),
    ],
)
def test_files_that_are_no_configuration_are_refused(content: bytes | None, fact: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=fact) as caught:
        load_config(str(file))
    assert str(file) in caught.value.message
    assert caught.value.remedy


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("# nothing yet\n")
    assert load_config(str(file)) == JobConfig()


def models() -> Iterator[type[BaseModel]]:
    for value in vars(config_module).values():
        if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == config_module.__name__:
            yield value


def test_sections_are_frozen_and_forbid_unknown_keys() -> None:
    assert len(list(models())) >= 11
    for model in models():
        assert model.model_config["frozen"] is True
        assert model.model_config["extra"] == "forbid"
    with pytest.raises(ValidationError):
        JobConfig().inference.actors = 7  # type: ignore[misc]
    with pytest.raises(ValidationError):
        JobConfig().output = None  # type: ignore[misc, assignment]


def objects(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if node.get("type") == "object":
            yield path, node
        for key, value in node.items():
            yield from objects(value, f"{path}/{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from objects(value, f"{path}/{index}")


def test_schema_is_valid_and_closed_everywhere() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)
    found = dict(objects(schema))
    assert len(found) >= 11
    for path, node in found.items():
        if path.endswith("/kwargs"):
            continue  # arguments of a user's own class
        assert node["additionalProperties"] is False, path
        for name, field in node["properties"].items():
            # Sections describe themselves; every key has its sentence.
            assert field.get("description") or "$ref" in field, f"{path}/{name}"


@pytest.mark.parametrize(
    "data",
    [
        {},
        FULL,
        JobConfig().model_dump(mode="json"),
        parse_config(FULL).model_dump(mode="json"),
        {"predictor": "module:Class"},
        {"predictor": None},
        {"predictor": {"path": "module:Class"}},
        {"model": {"labels": "imagenet-1k"}},
        {"inference": {"compile": True, "batch_size": 4}},
    ],
)
def test_schema_accepts_what_the_model_accepts(data: dict[str, Any]) -> None:
    parse_config(data)
    SCHEMA.validate(yaml.safe_load(yaml.safe_dump(data)))


@pytest.mark.parametrize(
    "data",
    [
        {"outptu": {}},
        {"model": {"transform": {"reseize": 1}}},
        {"predictor": "no colon"},
        {"predictor": {"path": "m:C", "arg": []}},
        {"inference": {"actors": 0}},
        {"inference": {"gpus_per_actor": -1}},
        {"inference": {"batch_size": "some"}},
        {"errors": {"max_percent": 101}},
        {"model": {"transform": {"std": [1, 1, 0]}}},
        {"model": {"sha256": "abc"}},
        {"shard_size": 0},
    ],
)
def test_schema_refuses_what_the_model_refuses(data: dict[str, Any]) -> None:
    refused(data)
    assert not SCHEMA.is_valid(data)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match=r"storage\.endpoint_url: the URL has credentials in it") as caught:
        parse_config({"storage": {"endpoint_url": "https://key:hunter2@minio.example:9000"}})
    assert "hunter2" not in str(caught.value)
    assert parse_config({"storage": {"endpoint_url": "https://minio.example/a@b"}}).storage.endpoint_url


@pytest.mark.parametrize(
    "url",
    [
        "%",
        "",
        "minio:9000",
        "http://",
        "http://minio:port",
        "http://minio:65536",
        "http://minio:0",
        "http://a b",
        "https://minio/?x=1",
        "https://m/%zz",
    ],
)
def test_endpoint_is_a_url(url: str) -> None:
    with pytest.raises(UserError, match=r"storage\.endpoint_url: an endpoint is a URL such as"):
        parse_config({"storage": {"endpoint_url": url}})


@pytest.mark.parametrize(
    "url", ["http://minio", "http://10.0.0.1:9000/", "http://[::1]:9000", "https://minio.example/s3"]
)
def test_endpoints_of_every_form_are_accepted(url: str) -> None:
    assert parse_config({"storage": {"endpoint_url": url}}).storage.endpoint_url == url


def test_endpoint_for_two_kinds_of_store_is_refused_with_the_variables() -> None:
    data = {"storage": {"endpoint_url": "http://localhost:1"}, "input": {"uris": ["s3://a/b", "c/"]}}
    with pytest.raises(UserError, match=r"the job names gs:// and s3://: remove it, and set AWS_ENDPOINT_URL"):
        parse_config(data | {"output": {"uri": "gs://a/out"}})
    assert parse_config(data | {"output": {"uri": "s3://b/out"}}).storage.endpoint_url


@pytest.mark.parametrize("uris", [[""], ["photos/", " "]])
def test_empty_input_is_not_the_current_directory(uris: list[str]) -> None:
    with pytest.raises(
        ValidationError, match=r"an input is empty, as from a shell variable that is not set; .* write \."
    ):
        InputConfig.model_validate({"uris": uris})
