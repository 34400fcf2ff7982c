"""Waits until a Ray cluster has its workers: workers.py DASHBOARD WORKERS SECONDS; exits 1 if that takes longer."""

import json
import os
import sys
import time
import urllib.request


def joined_workers(dashboard: str) -> int:
    """Return the number of workers that have joined, as the dashboard reports it."""
    token = os.environ.get("RAY_AUTH_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{dashboard}/api/v0/nodes?limit=10000", headers=headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=10) as reply:  # noqa: S310
        nodes = json.load(reply)["data"]["result"]["result"]
    return sum(node["state"] == "ALIVE" and not node["is_head_node"] for node in nodes)


def main(dashboard: str, wanted: int, seconds: float) -> None:
    """Ask until enough workers have joined, or exit when the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            count = joined_workers(dashboard)
            state = f"{count} of {wanted} workers have joined"
        except (OSError, ValueError, KeyError, TypeError) as error:
            count, state = -1, f"no answer from {dashboard}: {error}"
        if count >= wanted:
            print(f"OK: {state}")
            return
        if time.monotonic() >= deadline:
            sys.exit(f"FAILED after {seconds:g} s: {state}; look at pending pods: kubectl get pods, kubectl get events")
        print(state, flush=True)
        time.sleep(min(5, seconds))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
