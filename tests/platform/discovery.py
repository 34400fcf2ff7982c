"""Tell a Prometheus of the pods of a namespace, with the labels of its own discovery, which Debian's build lacks.

Runs beside it, in any image with Python: GET /NAMESPACE answers as `http_sd_configs` wants it.
"""

from __future__ import annotations

import json
import re
import ssl
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PORT = 9099
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
META = "__meta_kubernetes"


def targets(pods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a target for each port of each container that has an address."""
    found = []
    for pod in pods:
        metadata, address = pod["metadata"], pod["status"].get("podIP")
        common = {
            f"{META}_namespace": metadata["namespace"],
            f"{META}_pod_name": metadata["name"],
            f"{META}_pod_phase": pod["status"]["phase"],
            **{
                f"{META}_pod_label_{re.sub(r'[^a-zA-Z0-9_]', '_', key)}": value
                for key, value in metadata.get("labels", {}).items()
            },
        }
        for container in pod["spec"]["containers"]:
            for port in container.get("ports", []):
                labels = {
                    f"{META}_pod_container_name": container["name"],
                    f"{META}_pod_container_port_name": port.get("name", ""),
                    f"{META}_pod_container_port_number": str(port["containerPort"]),
                }
                if address:
                    found.append({"targets": [f"{address}:{port['containerPort']}"], "labels": {**common, **labels}})
    return found


class Handler(BaseHTTPRequestHandler):
    """Answers each request with the current pods of the API server."""

    def do_GET(self) -> None:
        """Answers with the targets of a namespace."""
        request = urllib.request.Request(
            f"https://kubernetes.default.svc/api/v1/namespaces{self.path}/pods",
            headers={"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}"},
        )
        trusted = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
        with urllib.request.urlopen(request, timeout=10, context=trusted) as reply:  # noqa: S310
            body = json.dumps(targets(json.load(reply)["items"])).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
