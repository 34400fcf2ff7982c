"""Where inputs may lie that a manifest names: its lines are a stranger's text, and the job's credentials open more than it should."""

from __future__ import annotations

import os
from dataclasses import dataclass

from batch_inference.config import InputConfig
from batch_inference.errors import RowError, RowFailure
from batch_inference.storage import canonical_uri, is_local, local_path

_STORES = ("s3://", "gs://", "az://")


@dataclass(frozen=True)
class Prefixes:
    """Prefixes of which every input must have one; what has none is a failed row.

    Attributes:
        allowed: Canonical URIs of folders or objects, or schemes alone (``s3://``).
        given: Whether a user gave them, rather than the rule for manifests on object stores.
    """

    allowed: tuple[str, ...]
    given: bool

    @classmethod
    def of(cls, section: InputConfig) -> Prefixes | None:
        """Of a configuration: what it says; else, for a manifest on an object store, object stores. None: no limit."""
        if section.manifest is None:
            return None
        if section.allowed_prefixes is not None:
            return cls(tuple(p if p.endswith("://") else canonical_uri(p) for p in section.allowed_prefixes), True)
        if is_local(canonical_uri(section.manifest)):
            return None
        return cls(_STORES, False)

    def refusal(self, uri: str) -> RowError | None:
        """Why an input is not read, or None; ``uri`` is canonical, or what no store would take."""
        # What no store takes is an INVALID_URI, and says so itself.
        if not uri.startswith(("file://", *_STORES)) or any(self._below(uri, prefix) for prefix in self.allowed):
            return None
        why = (
            f"it lies below none of input.allowed_prefixes ({', '.join(self.allowed) or 'which is empty'})"
            if self.given
            else "a manifest on an object store may name objects only; input.allowed_prefixes can allow it"
        )
        return RowFailure("list", "NOT_ALLOWED", why).error

    def _below(self, uri: str, prefix: str) -> bool:
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
