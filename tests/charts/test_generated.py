"""KubeRay and Kubernetes accept everything that the charts render."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch_inference.config import parse_config
from batch_inference.errors import UserError
from tests.charts import check
from tests.charts.oracle import ask
from tests.charts.render import HelmError, Values, find, render, render_text
from tests.charts.strategies import values

EXAMPLES = {"rayjob": 400, "raycluster": 200}
# Values that pass alone and clash together are rare enough; if most were refused, nothing would be tested.
LEAST_ACCEPTED = 0.5


@pytest.mark.parametrize("chart", EXAMPLES)
def test_generated_values_are_accepted_by_the_operator(chart: str, record_property: Any) -> None:
    tried = {"accepted": 0, "refused": 0}

    @settings(max_examples=EXAMPLES[chart], suppress_health_check=list(HealthCheck))
    @given(values(chart))
    def generated(chosen: Values) -> None:
        try:
            text = render_text(chart, chosen)
        except HelmError as error:
            # The chart's own rules may refuse, its schema may not, and a template must not stumble.
            assert error.problems, error
            tried["refused"] += 1
            return
        tried["accepted"] += 1
        checked, errors = ask(text)
        assert errors == []
        assert len(checked) == 1
        check.valid(render(chart, chosen))

    generated()
    print(
        f"\n{chart}: {tried['accepted']} generated values accepted by chart and operator, 0 disagreements; {tried['refused']} refused"
    )
    assert tried["accepted"] >= LEAST_ACCEPTED * sum(tried.values())


# A lone = is the one text that PyYAML does not read as other YAML libraries write it.
words = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), max_size=20).filter(
    lambda text: text != "="
)
tricky = st.sampled_from(
    [
        "1e3",
        "yes",
        "null",
        "~",
        "0x1f",
        "1_000",
        "2026-01-01",
        "1:30",
        "a: b",
        "- a",
        "#",
        "{{ .Values }}",
        "'\"",
        " x ",
        "@",
    ]
)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    st.lists((words | tricky).filter(str.strip), min_size=1, max_size=4),
    words | tricky,
    st.none() | st.floats(0, 100),
    st.integers(1, 2**40),
)
def test_job_arrives_as_it_was_given(uris: list[str], name: str, percent: float | None, pixels: int) -> None:
    job = {
        "input": {"uris": uris},
        "output": {"uri": "s3://out/"},
        "model": {"name": name, "weights": None},
        "errors": {"max_percent": percent},
        "preprocess": {"cpus_per_task": 1, "max_pixels": pixels},
        "inference": {"actors": 4, "gpus_per_actor": 1, "cpus_per_actor": 1},
    }
    rendered = yaml.safe_load(find(render("rayjob", {"job": job}), "ConfigMap")["data"]["job.yaml"])
    assert parse_config(rendered) == parse_config(job)


def test_value_of_the_job_that_only_the_program_checks_is_found_by_it() -> None:
    """The program refuses what JSON Schema cannot express; this documents the boundary."""
    job = {"predictor": {"path": "module:Class"}, "input": {"uris": ["a"]}}
    assert parse_config(job)
    with pytest.raises(UserError):
        parse_config({"predictor": {"path": "no class"}})
