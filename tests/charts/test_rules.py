"""The chart refuses now what the operator, Kueue, Kubernetes or Ray would refuse later."""

from __future__ import annotations

import copy

import pytest
import yaml

from tests.charts.oracle import ask
from tests.charts.render import HelmError, rayjob, render
from tests.charts.rules import CASES, RULES, TABLE, Case, table

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule}-{case.title}")


@cases
def test_chart_refuses(case: Case) -> None:
    with pytest.raises(HelmError) as refused:
        render("rayjob", case.values, name=case.name)
    assert case.says in str(refused.value)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.manifest], ids=lambda case: f"{case.rule}-{case.title}"
)
def test_operator_refuses_the_same_written_by_hand(case: Case) -> None:
    manifest = copy.deepcopy(rayjob(case.base))
    assert ask(yaml.safe_dump(manifest)) == ([f"RayJob/{manifest['metadata']['name']}"], [])
    case.manifest(manifest)
    _, errors = ask(yaml.safe_dump(manifest))
    assert case.operator in "\n".join(errors)


def test_all_problems_come_at_once_with_numbers_and_remedies() -> None:
    values = {
        "job": {"inference": {"gpus_per_actor": 2}, "output": {"uri": ""}},
        "workers": {"memoryGiB": 4},
        "run": {"suspend": True, "shutdownAfterJobFinishes": False},
    }
    with pytest.raises(HelmError) as refused:
        render("rayjob", values)
    problems = refused.value.problems
    assert len(problems) == 5
    assert f"{len(problems)} problems in the values" in str(refused.value)
    assert all(": " in problem for problem in problems)


def test_every_rule_of_the_list_has_a_case_and_is_in_the_table() -> None:
    assert {case.rule for case in CASES} == RULES.keys() == set(range(len(RULES)))
    assert TABLE.read_text() == table(), "run python -m tests.charts.rules"
