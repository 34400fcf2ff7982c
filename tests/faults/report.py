"""The table of injected faults and of promises that held, written by the run itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HEAD = (
    "| fault | promise | injected | held | rows lost | rows duplicated | time to recover, s |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


@dataclass(frozen=True)
class Outcome:
    """Injections of one kind.

    Attributes:
        fault: What was done.
        promise: What must hold.
        injected: How often it was done.
        held: How often the promise held.
        lost: Inputs without a row.
        duplicated: Inputs with more than one.
        recover_s: Longest time from an injection, or from the start after it, until all was well; None where nothing had stopped.
    """

    fault: str
    promise: str
    injected: int
    held: int
    lost: int
    duplicated: int
    recover_s: float | None = None


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as Markdown, with their sums."""
    lines = [HEAD]
    for one in outcomes:
        recover = "" if one.recover_s is None else f"{one.recover_s:.1f}"
        lines.append(
            f"| {one.fault} | {one.promise} | {one.injected} | {one.held} | {one.lost} | {one.duplicated} | {recover} |"
        )
    sums = [sum(getattr(one, name) for one in outcomes) for name in ("injected", "held", "lost", "duplicated")]
    lines.append(f"| all {len(outcomes)} | | " + " | ".join(map(str, sums)) + " | |")
    return "\n".join(lines) + "\n"


def write(outcomes: list[Outcome], file: Path) -> None:
    """Writes the table."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("# Faults\n\n" + table(outcomes))
