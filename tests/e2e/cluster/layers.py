"""Give a node an image of this machine's engine without copying it.

Podman and containerd keep a layer in the same form: a folder that overlayfs stacks on others. A node that mounts podman's folders
needs only the image's manifest and configuration, and a snapshot for each layer that refers to the folder. That takes seconds; to copy an
image of seven gigabytes takes two CPUs for a minute or more, and its size on disk twice.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.cluster.engines import engine
from tests.e2e.cluster.images import engine_run
from tests.e2e.cluster.process import run
from tests.support.limits import HANG_S

IN_NODE = "/engine"
SHARE_SECONDS = HANG_S
# Reads lines with a layer's name and its folder, the lowest first. The name is the one by which containerd looks for what is unpacked.
SNAPSHOTS = r"""
set -o errexit -o nounset -o pipefail
ctr="ctr --namespace k8s.io snapshots"
parent=
while read -r chain folder; do
  test -d "$folder"
  if ! $ctr info "$chain" >/dev/null 2>&1; then
    $ctr rm "new-$chain" >/dev/null 2>&1 || true
    $ctr prepare "new-$chain" $parent >/dev/null
    mount=$($ctr mounts /any "new-$chain")
    own=$(grep --only-matching --perl-regexp '(?<=upperdir=)[^, ]+|(?<=bind )\S+' <<<"$mount" | head -1)
    rmdir "$own"
    ln --symbolic "$folder" "$own"
    $ctr commit "$chain" "new-$chain" >/dev/null
  fi
  parent=$chain
done
"""


def store() -> Path | None:
    """Return the folder where the engine keeps images, or None if nodes cannot share its layers."""
    if engine().upstream:
        return None
    driver, root = engine_run("info", "--format", "{{.Store.GraphDriverName}} {{.Store.GraphRoot}}").split()
    return Path(root) if driver == "overlay" else None


def mounts() -> list[dict[str, Any]]:
    """Return the mounts that a node needs to share layers, for kind's configuration."""
    root = store()
    return [{"hostPath": str(root / "overlay"), "containerPath": IN_NODE, "readOnly": True}] if root else []


@dataclass(frozen=True)
class Image:
    """An image as podman has it."""

    name: str
    manifest: bytes
    config: bytes
    folders: tuple[str, ...]

    @classmethod
    def find(cls, name: str, root: Path) -> Image:
        """Read what podman knows of an image.

        Raises:
            OSError: If podman keeps it in another way.
        """
        found = json.loads(engine_run("image", "inspect", name))[0]
        identity = found["Id"].removeprefix("sha256:")
        files = root / "overlay-images" / identity
        key = base64.b64encode(f"sha256:{identity}".encode()).decode()
        data = found["GraphDriver"]["Data"]
        # The uppermost first, as overlayfs takes them.
        folders = [data["UpperDir"], *filter(None, data.get("LowerDir", "").split(":"))]
        inside = tuple(str(Path(IN_NODE) / Path(folder).relative_to(root / "overlay")) for folder in folders[::-1])
        return cls(name, (files / "manifest").read_bytes(), (files / f"={key}").read_bytes(), inside)

    def chains(self) -> list[str]:
        """Return the chain ID of each layer, as the OCI specification defines it."""
        layers = json.loads(self.config)["rootfs"]["diff_ids"]
        names: list[str] = layers[:1]
        for layer in layers[1:]:
            names.append(f"sha256:{hashlib.sha256(f'{names[-1]} {layer}'.encode()).hexdigest()}")
        return names

    def archive(self) -> bytes:
        """Return an OCI archive of the image without its layers."""
        kind = json.loads(self.manifest).get("mediaType", "application/vnd.oci.image.manifest.v1+json")
        descriptor = {
            "mediaType": kind,
            "digest": f"sha256:{hashlib.sha256(self.manifest).hexdigest()}",
            "size": len(self.manifest),
            "annotations": {"io.containerd.image.name": self.name},
        }
        files = {
            "oci-layout": json.dumps({"imageLayoutVersion": "1.0.0"}).encode(),
            "index.json": json.dumps({"schemaVersion": 2, "manifests": [descriptor]}).encode(),
            **{f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}": blob for blob in (self.manifest, self.config)},
        }
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for path, content in files.items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return out.getvalue()


def find(name: str) -> Image | None:
    """Return an image whose layers nodes can share, or None if podman keeps it in a way that is not known here."""
    root = store()
    try:
        image = Image.find(name, root) if root else None
    except (OSError, KeyError, ValueError):
        return None
    return image if image and len(image.chains()) == len(image.folders) else None


def share(image: Image, node: str) -> None:
    """Give a node an image by the folders of its layers."""
    inside = (engine().command, "exec", "--interactive", node)
    lines = "".join(f"{chain} {folder}\n" for chain, folder in zip(image.chains(), image.folders, strict=True))
    run(*inside, "bash", "-c", SNAPSHOTS, env=engine().env, stdin=lines, timeout=SHARE_SECONDS)
    with tempfile.TemporaryFile() as file:
        file.write(image.archive())
        file.seek(0)
        ctr = ("ctr", "--namespace", "k8s.io", "images", "import", "--no-unpack", "-")
        run(*inside, *ctr, env=engine().env, stdin=file, timeout=SHARE_SECONDS)
