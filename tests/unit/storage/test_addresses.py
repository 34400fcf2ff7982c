"""Endpoint and region of a bucket, for requests and for listings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from batch_inference.config import StorageConfig
from batch_inference.inputs import bucket_listing
from batch_inference.storage.addresses import BucketAddress, bucket_address


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the machine's own profiles and variables."""
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_DEFAULT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("GOOGLE_BASE_URL", raising=False)


@pytest.fixture
def profile(tmp_path: Path) -> None:
    """Write a default profile with keys, a region and an endpoint."""
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = id\naws_secret_access_key = key\n")
    (tmp_path / "config").write_text("[default]\nregion = eu-north-1\nendpoint_url = https://profile.example\n")


@pytest.mark.usefixtures("profile")
def test_profile_gives_region_endpoint_and_keys() -> None:
    keys = {"access_key_id": "id", "secret_access_key": "key"}
    assert bucket_address("s3", StorageConfig()) == BucketAddress("https://profile.example", "eu-north-1", keys)


@pytest.mark.usefixtures("profile")
def test_configuration_comes_before_environment_and_environment_before_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://environment.example")
    address = bucket_address("s3", StorageConfig())
    assert (address.endpoint, address.region) == ("https://environment.example", "us-west-2")
    monkeypatch.setenv("AWS_REGION", "us-west-1")
    assert bucket_address("s3", StorageConfig()).region == "us-west-1"
    address = bucket_address("s3", StorageConfig(endpoint_url="https://configured.example", region="sa-east-1"))
    assert (address.endpoint, address.region) == ("https://configured.example", "sa-east-1")


@pytest.mark.usefixtures("profile")
def test_other_stores_have_no_region_and_no_profile() -> None:
    assert bucket_address("gs", StorageConfig()) == BucketAddress(None)


def test_region_without_any_setting() -> None:
    assert bucket_address("s3", StorageConfig()) == BucketAddress(None, "us-east-1")


@pytest.mark.usefixtures("profile")
def test_listing_uses_region_and_endpoint_of_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(fs, "S3FileSystem", lambda **options: given.update(options))
    bucket_listing._arrow_store("s3://photos", StorageConfig())
    assert (given["region"], given["endpoint_override"]) == ("eu-north-1", "https://profile.example")


def test_listing_has_no_endpoint_without_any_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(fs, "S3FileSystem", lambda **options: given.update(options))
    bucket_listing._arrow_store("s3://photos", StorageConfig())
    assert given["region"] == "us-east-1"
    assert "endpoint_override" not in given
