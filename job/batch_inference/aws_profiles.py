"""Profiles of ``~/.aws``, of which obstore knows nothing: their keys, region and endpoint."""

from __future__ import annotations

import configparser
import os
from dataclasses import dataclass
from pathlib import Path

from batch_inference.errors import UserError

# Where other credentials come from; they count before a profile's, as they do for the AWS command.
_BEFORE = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
# Ways to credentials that need AWS's own tools.
_NEED_TOOLS = ("sso_session", "sso_start_url", "credential_process", "role_arn", "login_session")


@dataclass(frozen=True)
class Profile:
    """What a profile gives.

    Attributes:
        keys: Options of obstore's, empty where the profile has no keys or others count before them.
        region: Its region, or None.
        endpoint_url: Its endpoint, or None.
    """

    keys: dict[str, str]
    region: str | None = None
    endpoint_url: str | None = None


def profile(anonymous: bool) -> Profile:
    """Read the profile that ``AWS_PROFILE`` names, or ``default``.

    Args:
        anonymous: No credentials are wanted.

    Raises:
        UserError: If ``AWS_PROFILE`` names one that is not there, or that has no keys but a way to some that only AWS's own
            tools know (SSO, a process, another role).
    """
    named = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    name = named or "default"
    shared = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials")
    config = Path(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config")
    profiles: dict[str, dict[str, str]] = {}
    for file, prefix in ((config, "profile "), (shared, "")):
        for section, values in _sections(file).items():
            if prefix and section != "default" and not section.startswith(prefix):
                continue  # `sso-session NAME` and `services NAME`
            profiles.setdefault(section.removeprefix(prefix).strip(), {}).update(values)
    found = profiles.get(name, {})
    wanted = not anonymous and not any(os.environ.get(variable) for variable in _BEFORE)
    if named and wanted and name not in profiles:
        raise UserError(
            f"AWS_PROFILE is {name!r}, and neither {config} nor {shared} has such a profile",
            f"Choose one of {', '.join(sorted(profiles))}, or unset AWS_PROFILE."
            if profiles
            else "Make one with aws configure --profile, or unset AWS_PROFILE and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        )
    keys = {}
    if wanted and "aws_access_key_id" in found and "aws_secret_access_key" in found:
        names = {"access_key_id": "aws_access_key_id", "secret_access_key": "aws_secret_access_key"}
        keys = {option: found[key] for option, key in names.items()}
        if "aws_session_token" in found:
            keys["session_token"] = found["aws_session_token"]
    elif named and wanted and (ways := [way for way in _NEED_TOOLS if way in found]):
        raise UserError(
            f"the profile {name!r} of AWS_PROFILE has no keys but {', '.join(ways)}, which only AWS's own tools can use",
            f'Run eval "$(aws configure export-credentials --profile {name} --format env)", then the same command again.',
        )
    ignored = os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true"
    return Profile(keys, found.get("region"), None if ignored else found.get("endpoint_url"))


def _sections(file: Path) -> dict[str, dict[str, str]]:
    parser = configparser.RawConfigParser(strict=False, default_section="")
    try:
        parser.read_string(file.expanduser().read_text(encoding="utf-8"))
    except (OSError, RuntimeError):
        return {}  # not there, or no home folder
    except (configparser.Error, ValueError):
        # What is wrong with it is not repeated: the line may be a key.
        raise UserError(
            f"{file} is not a valid file of profiles", "Correct it; aws configure list shows its mistake."
        ) from None
    return {section: dict(parser.items(section)) for section in parser.sections()}
