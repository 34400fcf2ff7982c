"""The table of a run, and the list of those that survived."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from tests.mutants.campaign import Outcome, Tree
from tests.mutants.equivalent import Reviewed

Key = tuple[str, str, str, str]


def score(outcomes: Iterable[Outcome], reviewed: dict[Key, Reviewed]) -> tuple[Counter[str], float]:
    """Return counts, and the share of mutants that tests notice, in percent, without those that are equivalent."""
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        counts["mutants"] += 1
        missed = outcome.status in ("survived", "uncovered")
        counts[outcome.status] += 1
        if missed and outcome.mutant.key in reviewed:
            counts[reviewed[outcome.mutant.key].kind] += 1
        elif missed:
            counts["open"] += 1
    noticed = counts["killed"] + counts["timed out"]
    return counts, 100 * noticed / max(1, counts["mutants"] - counts["equivalent"])


def table(outcomes: list[Outcome], reviewed: dict[Key, Reviewed]) -> str:
    """Return the results as Markdown."""
    columns = ("mutants", "killed", "timed out", "survived", "uncovered", "equivalent", "harmless", "open")
    lines = [f"| module | {' | '.join(columns)} | score |", f"| --- {'| --- ' * (len(columns) + 1)}|"]
    modules = list(dict.fromkeys(outcome.mutant.module for outcome in outcomes))
    for name, some in [(f"`{m}`", [o for o in outcomes if o.mutant.module == m]) for m in modules] + [
        ("all", outcomes)
    ]:
        counts, percent = score(some, reviewed)
        lines.append(f"| {name} | {' | '.join(str(counts[column]) for column in columns)} | {percent:.1f} % |")
    return "\n".join(lines)


def diff(outcome: Outcome, tree: Tree) -> str:
    """Return the change of a mutant as a diff."""
    mutant = outcome.mutant
    lines = difflib.unified_diff(
        tree.source(mutant.module).splitlines(),
        mutant.source.splitlines(),
        mutant.module,
        mutant.module,
        n=2,
        lineterm="",
    )
    return "\n".join(list(lines)[2:])


def report(outcomes: list[Outcome], reviewed: dict[Key, Reviewed], stale: list[Key], tree: Tree, folder: Path) -> int:
    """Write and print the results; return 1 if a mutant survived that is not reviewed, or a reviewed one is not there."""
    missed = [outcome for outcome in outcomes if outcome.status in ("survived", "uncovered")]
    texts, new = [], []
    for outcome in missed:
        mutant = outcome.mutant
        known = reviewed.get(mutant.key)
        head = f"{mutant.module}:{mutant.line} {mutant.function or '(module)'}, {mutant.operator}: {outcome.status}"
        block = f"[{mutant.module}{' ' * bool(mutant.function)}{mutant.function}]\n- {mutant.before}\n+ {mutant.after}"
        verdict = f"{known.kind}: {known.reason}" if known else f"open ({outcome.tests} tests run it)"
        texts.append(f"{head}\n{verdict}\n{diff(outcome, tree)}\n\n{block}\n")
        if known is None:
            new.append(f"{head}\n- {mutant.before}\n+ {mutant.after}")
    records = [{**asdict(o), "mutant": {**asdict(o.mutant), "source": None}} for o in outcomes]
    (folder / "outcomes.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    (folder / "survivors.txt").write_text("\n".join(texts), encoding="utf-8")
    text = table(outcomes, reviewed)
    (folder / "mutants.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    for line in new:
        print(f"\nno test notices, and it is not reviewed: {line}")
    for module, function, before, after in stale:
        print(f"\nreviewed, but there is no such mutant any more: [{module} {function}]\n- {before}\n+ {after}")
    if new:
        print(f"\n{len(new)} mutants survived; {folder / 'survivors.txt'} has their diffs")
    return int(bool(new or stale))
