"""What is printed before the first tier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.tiers import machine
from tests.tiers.changes import Choice
from tests.tiers.figures import FOLDERS, Tier


def say(text: str) -> None:
    """Print a line at once, also into a file."""
    print(text, flush=True)


def say_choice(files: Sequence[str], base: str, choices: dict[str, Choice]) -> None:
    """Print what each tier runs for a change, and why."""
    say(f"{len(files)} files changed since {base}:")
    for name, choice in choices.items():
        say(f"  {name:8}{'runs' if choice.tests is not None else 'does not run'}: {choice.why}")


def say_plan(tiers: Sequence[Tier]) -> None:
    """Print what is run, how long that takes, and what it leaves where."""
    names = {tier.name for tier in tiers}
    warm, cold = (sum(getattr(tier, key) for tier in tiers) for key in ("warm", "cold"))
    say(
        f"Runs {', '.join(tier.name for tier in tiers)}. On two free cores the whole of them takes {warm:.0f} minutes, "
        f"or {cold:.0f} with empty caches."
    )
    caches = [f"{folder.gb:.0f} GB in {_short(folder.path)}" for folder in FOLDERS if folder.tiers & names]
    say(f"Caches {', '.join(caches)}.")


def _short(path: Path) -> str:
    for root, name in ((Path.cwd(), "."), (Path.home(), "~")):
        if path.is_relative_to(root):
            return str(Path(name) / path.relative_to(root))
    return str(path)


def say_lacks(tiers: Sequence[Tier]) -> bool:
    """Print what the machine lacks; say whether the run can get it."""
    found = list(machine.lacks({tier.name for tier in tiers}))
    for lack in found:
        if not lack.fatal:
            say(f"Missing here: {lack.what}. The run {lack.answer}.")
    for lack in found:
        if lack.fatal:
            say(f"Cannot run all tiers: needs {lack.what}. Remedy: {lack.answer}.")
    if not any(lack.fatal for lack in found):
        return True
    say("Nothing was run. Single tiers may still do: make lint test-unit test-charts test-report test-job test-e2e")
    return False
