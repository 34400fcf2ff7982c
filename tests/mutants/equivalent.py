"""The reviewed list of mutants that no test has to notice: ``equivalent.txt``.

A block names the module and the function, the lines before and after, and the reason:

    [inputs/allowlist.py _is_below]
    - folder = prefix.rstrip("/")
    + folder = prefix
    equivalent: why no input tells the two apart

``equivalent`` is left out of the score. ``harmless`` is not: a test could tell the difference, but only of speed, logs or the like.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("equivalent.txt")
_BLOCK = re.compile(r"\[(\S+?)(?: (\S+))?\]\n- (.*)\n\+ ?(.*)\n(equivalent|harmless): (\S.*)$", re.DOTALL)


@dataclass(frozen=True)
class Reviewed:
    """A mutant that may survive.

    Attributes:
        kind: ``equivalent`` or ``harmless``.
        reason: Why.
    """

    kind: str
    reason: str


def read_reviewed(text: str) -> dict[tuple[str, str, str, str], Reviewed]:
    """Return the reviewed mutants by their key.

    Raises:
        ValueError: If a block is not understood or comes twice.
    """
    found: dict[tuple[str, str, str, str], Reviewed] = {}
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = "\n".join(line for line in block.splitlines() if not line.startswith("#"))
        if not lines:
            continue
        match = _BLOCK.match(lines)
        if match is None:
            raise ValueError(f"not understood:\n{block}")
        module, function, before, after, kind, reason = match.groups()
        key = (module, function or "", before, after)
        if key in found:
            raise ValueError(f"twice:\n{block}")
        found[key] = Reviewed(kind, " ".join(reason.split()))
    return found
