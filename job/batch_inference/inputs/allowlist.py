"""Restrict which locations a manifest may name.

Manifests are untrusted input, and the job's credentials usually reach more than their author should.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from batch_inference.config import InputConfig
from batch_inference.errors import RowError, RowFailure
from batch_inference.storage.uris import canonical_uri, is_local, local_path

_STORES = ("s3://", "gs://", "az://")


@dataclass(frozen=True)
class Allowlist:
    """Prefixes of which every input must have one; an input without one is a failed row.

    Attributes:
        prefixes: Canonical URIs of folders or objects, or schemes alone (``s3://``).
        configured: Whether a user gave them, rather than the rule for manifests on object stores.
    """

    prefixes: tuple[str, ...]
    configured: bool

    @classmethod
    def from_config(cls, config: InputConfig) -> Allowlist | None:
        """Return the configured prefixes; else, for a manifest on an object store, all object stores; None: no limit."""
        if config.manifest is None:
            return None
        if config.allowed_prefixes is not None:
            return cls(tuple(p if p.endswith("://") else canonical_uri(p) for p in config.allowed_prefixes), True)
        if is_local(canonical_uri(config.manifest)):
            return None
        return cls(_STORES, False)

    def refusal(self, uri: str) -> RowFailure | None:
        """Return why an input is not read, or None.

        Args:
            uri: Canonical, or a text that no store takes: it is an INVALID_URI, which is reported where it is read.
        """
        if not uri.startswith(("file://", *_STORES)) or any(_is_below(uri, prefix) for prefix in self.prefixes):
            return None
        fact = (
            f"it lies below none of input.allowed_prefixes ({', '.join(self.prefixes) or 'which is empty'})"
            if self.configured
            else "a manifest on an object store may name objects only; input.allowed_prefixes can allow it"
        )
        return RowError("list", "NOT_ALLOWED", fact).error


def _is_below(uri: str, prefix: str) -> bool:
    if prefix.endswith("://"):
        return uri.startswith(prefix)
    path = uri
    if is_local(uri) and is_local(prefix):
        # Neither `..` nor a link leads out.
        path = "file://" + os.path.realpath(local_path(uri))
        prefix = "file://" + os.path.realpath(local_path(prefix))
    elif any(part in (".", "..") for part in uri.split("/")):
        return False
    folder = prefix.rstrip("/")
    return path == folder or path.startswith(folder + "/") or path.startswith(folder + "#")
