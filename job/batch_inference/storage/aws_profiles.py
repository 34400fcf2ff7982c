"""Keys, region and endpoint of the profiles in ``~/.aws``, which obstore does not read."""

from __future__ import annotations

import configparser
import os
from dataclasses import dataclass
from pathlib import Path

from batch_inference.errors import UserError

# Variables of other credentials, which come before a profile's, as they do for the AWS command.
_CREDENTIALS_BEFORE = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
# Keys of a profile whose credentials only AWS's own tools can get.
_TOOL_KEYS = ("sso_session", "sso_start_url", "credential_process", "role_arn", "login_session")


@dataclass(frozen=True)
class Profile:
    """The settings of one profile.

    Attributes:
        keys: obstore's options with its keys; empty if the profile has none, or others come before them.
        region: Region, or None.
        endpoint_url: Endpoint, or None.
    """

    keys: dict[str, str]
    region: str | None = None
    endpoint_url: str | None = None


def load_profile(anonymous: bool) -> Profile:
    """Read the profile that ``AWS_PROFILE`` names, or ``default``.

    Args:
        anonymous: Whether no credentials are wanted.

    Raises:
        UserError: If ``AWS_PROFILE`` names a profile that is missing, or one whose keys only AWS's own tools can get
            (SSO, a process, another role).
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
    settings = profiles.get(name, {})
    wanted = not anonymous and not any(os.environ.get(variable) for variable in _CREDENTIALS_BEFORE)
    if named and wanted and name not in profiles:
        raise UserError(
            f"AWS_PROFILE is {name!r}, and neither {config} nor {shared} has such a profile",
            f"Choose one of {', '.join(sorted(profiles))}, or unset AWS_PROFILE."
            if profiles
            else "Create one with aws configure --profile, or unset AWS_PROFILE and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
        )
    keys = {}
    if wanted and "aws_access_key_id" in settings and "aws_secret_access_key" in settings:
        names = {"access_key_id": "aws_access_key_id", "secret_access_key": "aws_secret_access_key"}
        keys = {option: settings[key] for option, key in names.items()}
        if "aws_session_token" in settings:
            keys["session_token"] = settings["aws_session_token"]
    elif named and wanted and (ways := [way for way in _TOOL_KEYS if way in settings]):
        raise UserError(
            f"the profile {name!r} of AWS_PROFILE has no keys but {', '.join(ways)}, which only AWS's own tools can use",
            f'Run eval "$(aws configure export-credentials --profile {name} --format env)", then the same command again.',
        )
    ignored = os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true"
    return Profile(keys, settings.get("region"), None if ignored else settings.get("endpoint_url"))


def _sections(file: Path) -> dict[str, dict[str, str]]:
    parser = configparser.RawConfigParser(strict=False, default_section="")
    try:
        parser.read_string(file.expanduser().read_text(encoding="utf-8"))
    except (OSError, RuntimeError):
        return {}  # not there, or no home folder
    except (configparser.Error, ValueError):
        # The parser's message is not shown: its line may hold a key.
        raise UserError(
            f"{file} is not a valid file of profiles", "Correct it; aws configure list shows its mistake."
        ) from None
    return {section: dict(parser.items(section)) for section in parser.sections()}
