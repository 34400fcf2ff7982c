"""Endpoint and region of a bucket, from the configuration, the environment and the AWS profile."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from batch_inference.config import StorageConfig
from batch_inference.storage.aws_profiles import Profile, load_profile
from batch_inference.storage.uris import endpoint_of


@dataclass(frozen=True)
class BucketAddress:
    """Endpoint and region of a store's buckets, and the keys that come with them.

    Attributes:
        endpoint: URL of the store; None for the scheme's own.
        region: Region of S3; "" for other stores.
        keys: obstore's options with the keys of the AWS profile; empty if it has none, or others come before them.
    """

    endpoint: str | None
    region: str = ""
    keys: dict[str, str] = field(default_factory=dict)


def bucket_address(scheme: str, storage: StorageConfig) -> BucketAddress:
    """Return the address of a scheme's buckets; the configuration comes before the environment, and that before the profile.

    Raises:
        UserError: If the AWS profile is missing, or its keys need AWS's own tools.
    """
    profile = load_profile(storage.anonymous) if scheme == "s3" else Profile({})
    endpoint = endpoint_of(scheme, storage) or profile.endpoint_url
    if scheme != "s3":
        return BucketAddress(endpoint)
    from_environment = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    region = storage.region or from_environment or profile.region or "us-east-1"
    return BucketAddress(endpoint, region, profile.keys)
