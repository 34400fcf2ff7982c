"""`make test`: what it announces, what it chooses for a change, and its table; the tiers are made up."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import cache, engines
from tests.e2e.cluster.cache import product
from tests.e2e.cluster.programs import PROGRAMS
from tests.support.limits import HANG_S, TEST_S
from tests.tiers import announce, changes, figures, machine, runner
from tests.tiers.changes import Graph, changed_files, choose
from tests.tiers.figures import REPOSITORY, TIERS, Tier
from tests.tiers.runner import Counts, Result, Run, Step, keeps_going, read_counts, table

TESTS = REPOSITORY / "tests"
A, B, C = (Tier(name, f"test-{name}", 1, 2, (f"tests/{name}",)) for name in "abc")


# --- announcement ---


def test_announcement_needs_no_package() -> None:
    command = [sys.executable, "-S", "-E", "-m", "tests.tiers", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--changed" in done.stdout


def test_plan_says_time_and_caches_of_the_tiers_that_run(capsys: pytest.CaptureFixture[str]) -> None:
    by_name = {tier.name: tier for tier in TIERS}
    announce.say_plan([by_name["setup"], by_name["e2e"]])
    printed = capsys.readouterr().out
    warm, cold = (sum(getattr(by_name[name], key) for name in ("setup", "e2e")) for key in ("warm", "cold"))
    assert (
        f"Runs setup, e2e. On two free cores the whole of them takes {warm:.0f} minutes, or {cold:.0f} with" in printed
    )
    assert "Caches 8 GB in .venv, 2 GB in ~/.cache/uv, " in printed
    assert "GB in /var/lib/containers." in printed
    announce.say_plan([by_name["report"]])
    assert "GB in /var/lib/containers." not in capsys.readouterr().out


def test_tiers_are_targets_that_write_their_results() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for tier in TIERS:
        (body,) = re.findall(rf"^{tier.target}:.*\n((?:\t.*\n)*)", makefile, re.MULTILINE)
        for folder in tier.folders:
            assert folder in body
            assert f"$(call RESULTS,{tier.name})" in body
            assert "$(or $(TESTS)," in body


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[machine.Lack]]:
    """Returns what a machine with nothing but some commands lacks, as root or not."""

    monkeypatch.setattr(machine, "FOLDERS", (figures.Folder(tmp_path / "no", 10, frozenset({"e2e"})),))

    def lacks(
        *tiers: str,
        root: bool = True,
        commands: tuple[str, ...] = ("apt-get",),
        disk: float = 1e12,
        namespaces: bool = True,
    ) -> Any:
        monkeypatch.setattr(machine, "ROOT", tmp_path / "cache")
        monkeypatch.setattr(machine, "installed_go", lambda: (None, []))
        monkeypatch.setattr(machine, "_namespaces", lambda: namespaces)
        monkeypatch.setattr(engines, "_works", lambda command: False)
        monkeypatch.setattr(shutil, "which", lambda command: command if command in commands else None)
        monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(int(1e13), 0, int(disk)))
        for name in ("CHROMIUM", "JAVA_HOME", "CLUSTER_IMAGES", "PLAYWRIGHT_BROWSERS_PATH"):
            monkeypatch.delenv(name, raising=False)
        return list(machine.lacks(tiers))

    return lacks


def test_root_gets_everything_that_a_bare_machine_lacks(bare: Callable[..., list[machine.Lack]]) -> None:
    found = bare("unit", "charts", "report", "job", "e2e")
    assert [lack.what.split(" (")[0] for lack in found] == [
        "Go 1.26 or newer", "Node with npm", "Chromium", "Prometheus", "Java", "a container engine",
    ]  # fmt: skip
    assert not any(lack.fatal for lack in found)
    assert bare("unit") == found[:1]
    assert bare("lint") == []


@pytest.mark.parametrize(
    ("options", "what", "remedy"),
    [
        ({"root": False}, "a container engine", "only root may run apt-get update"),
        ({"root": False, "commands": ("apt-get", *engines.DEBIAN_COMMANDS)}, "a container engine", "run as root"),
        ({"commands": ()}, "a container engine", "there is no apt-get"),
        ({"namespaces": False}, "a container engine", "CAP_SYS_ADMIN"),
    ],
)
def test_lack_that_nothing_can_be_done_about_is_fatal(
    options: dict[str, Any], what: str, remedy: str, bare: Callable[..., list[machine.Lack]]
) -> None:
    (fatal,) = [lack for lack in bare("e2e", **options) if lack.fatal]
    assert what in fatal.what
    assert remedy in fatal.answer


def test_user_needs_a_browser_that_root_can_download(bare: Callable[..., list[machine.Lack]], tmp_path: Path) -> None:
    assert [lack.fatal for lack in bare("report")] == [False]
    assert [lack.fatal for lack in bare("report", root=False)] == [True]
    assert bare("report", root=False, commands=("chromium",)) == []
    (tmp_path / "cache/chromium/0123").mkdir(parents=True)
    assert bare("report", root=False) == []


def test_folders_that_are_there_need_no_space(
    bare: Callable[..., list[machine.Lack]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = figures.Folder(tmp_path / "wheels", 50, frozenset({"unit"}))
    monkeypatch.setattr(machine, "FOLDERS", (folder,))
    go = ("apt-get",)
    _, disk = bare("unit", commands=go, disk=40e9)
    assert disk.what.startswith("53 GB free on the disk of ")
    assert "XDG_CACHE_HOME" in disk.answer
    assert not disk.fatal, "the figures are an estimate, and the run may do with less"
    assert len(bare("unit", commands=go, disk=60e9)) == 1
    folder.path.joinpath("some").mkdir(parents=True)
    assert len(bare("unit", commands=go, disk=40e9)) == 1


def test_fatal_lack_ends_the_run_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacks = [machine.Lack("Node", "installs it"), machine.Lack("a moon", "wait for night", fatal=True)]
    monkeypatch.setattr(machine, "lacks", lambda tiers: lacks[: int(os.environ["LACKS"])])
    monkeypatch.setenv("LACKS", "1")
    assert announce.say_lacks([A])
    assert capsys.readouterr().out == "Missing here: Node. The run installs it.\n"
    monkeypatch.setenv("LACKS", "2")
    assert not announce.say_lacks([A])
    assert "Cannot run all tiers: needs a moon. Remedy: wait for night.\nNothing was run." in capsys.readouterr().out


# --- choice ---


@pytest.fixture(scope="module")
def graph() -> Graph:
    return Graph()


def chosen(graph: Graph, *changed: str) -> dict[str, set[str] | str]:
    """Returns the chosen test files of each tier, or "all", without tiers that run nothing."""
    return {
        name: set(choice.tests) or "all"
        for name, choice in choose(changed, graph).items()
        if choice.tests is not None and name not in ("setup", "lint")
    }


def test_leaf_module_runs_its_tests_and_whole_jobs(graph: Graph) -> None:
    found = chosen(graph, "job/batch_inference/report/throughput.py")
    assert {"tests/unit/report/test_throughput.py", "tests/unit/report/test_build.py"} <= set(found["unit"])
    assert not {"tests/unit/images/test_pixels.py", "tests/unit/storage/test_store.py"} & set(found["unit"])
    assert found["report"] == "all"
    assert found["job"] == "all"
    assert "e2e" not in found


def test_module_that_only_pods_run_runs_no_jobs(graph: Graph) -> None:
    assert chosen(graph, "job/batch_inference/kubernetes/prestop.py") == {
        "unit": {"tests/unit/kubernetes/test_prestop.py", "tests/unit/project/test_house.py"},
        "e2e": "all",
    }


def test_module_of_reviewed_mutants_runs_their_check(graph: Graph) -> None:
    assert "tests/unit/project/test_mutants.py" in chosen(graph, "job/batch_inference/output/ledger.py")["unit"]


def test_configuration_runs_nearly_everything(graph: Graph) -> None:
    found = chosen(graph, "job/batch_inference/config.py")
    assert len(found["unit"]) > 60
    # Its schema is part of the charts'.
    assert {"tests/charts/test_values.py", "tests/charts/test_generated.py"} <= set(found["charts"])
    assert found["report"] == found["job"] == "all"


def test_chart_template_runs_charts_and_cluster(graph: Graph) -> None:
    found = chosen(graph, "helm/rayjob/templates/_rules.tpl")
    assert found["charts"] == found["e2e"] == "all"
    assert "job" not in found
    assert {file.rpartition("/")[0] for file in found["unit"]} == {"tests/docs", "tests/unit/project"}


def test_capacity_runs_all_charts(graph: Graph) -> None:
    assert chosen(graph, "job/batch_inference/kubernetes/capacity.py")["charts"] == "all"


def test_document_runs_the_tests_of_documents_and_of_its_commands(graph: Graph) -> None:
    found = chosen(graph, "docs/guide.md")
    docs = {file for file in graph.files if re.fullmatch(r"tests/docs/test_\w+\.py", file)}
    assert set(found.pop("unit")) - docs <= {"tests/unit/project/test_house.py", "tests/unit/project/test_tiers.py"}
    assert found == {"job": {"tests/job/test_documents.py"}} or "charts" in found
    assert "tests/job/test_documents.py" in found["job"]


def test_test_runs_itself(graph: Graph) -> None:
    house = "tests/unit/project/test_house.py"
    assert chosen(graph, "tests/unit/images/test_decode.py") == {"unit": {"tests/unit/images/test_decode.py", house}}
    assert chosen(graph, "tests/e2e/test_image.py") == {"unit": {house}, "e2e": {"tests/e2e/test_image.py"}}


def test_helper_runs_the_tests_that_use_it(graph: Graph) -> None:
    assert chosen(graph, "tests/support/spark.py")["job"] == {
        "tests/job/test_documents.py", "tests/job/test_schema.py",
    }  # fmt: skip
    # No test imports it: jobs load it by name.
    assert chosen(graph, "tests/job/predictors.py")["job"] == "all"
    assert chosen(graph, "tests/poison/sitecustomize.py")["job"] == "all"
    assert chosen(graph, "tests/report/conftest.py")["report"] == "all"


def test_data_of_the_package_runs_what_its_modules_run(graph: Graph) -> None:
    template = "job/batch_inference/report/templates/page.html"
    assert chosen(graph, template)["unit"] >= {"tests/unit/report/test_build.py"}  # type: ignore[operator]
    gone = "job/batch_inference/report/gone.py"
    assert chosen(graph, gone)["report"] == "all"


@pytest.mark.parametrize("name", ["Makefile", "pyproject.toml", "requirements-dev.lock", "tests/conftest.py"])
def test_ground_of_all_tests_runs_all(graph: Graph, name: str) -> None:
    found = choose([name, "README.md"], graph)
    assert set(found) == {tier.name for tier in TIERS}
    assert {choice.tests for choice in found.values()} == {()}
    assert {choice.why for choice in found.values()} == {f"{name} changed"}


def test_no_change_runs_nothing(graph: Graph) -> None:
    assert {choice.tests for choice in choose([], graph).values()} == {None}


def test_rules_name_what_is_there(graph: Graph) -> None:
    for rule in changes.RULES:
        assert any(re.fullmatch(rule.files, file) for file in graph.files), rule
        assert any(re.fullmatch(rule.tests, file) for file in graph.files), rule


@pytest.fixture
def repository(tmp_path: Path) -> Callable[..., str]:
    """Makes a repository with a commit on main; returns a function that runs git in it."""

    def git(*arguments: str) -> str:
        named = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", *named, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)  # noqa: S607
        return done.stdout

    git("init", "--quiet", "--initial-branch=main")
    for name in ("a", "b"):
        tmp_path.joinpath(name).write_text("1" * 100)
        git("add", name)
        git("commit", "--quiet", f"--message={name}")
    return git


def test_changes_are_those_since_main_left_off(repository: Callable[..., str], tmp_path: Path) -> None:
    repository("checkout", "--quiet", "-b", "work")
    repository("mv", "a", "moved")
    repository("commit", "--quiet", "--message=move")
    # What main has got since is no change of this branch.
    repository("checkout", "--quiet", "main")
    tmp_path.joinpath("theirs").write_text("x")
    repository("add", "theirs")
    repository("commit", "--quiet", "--message=theirs")
    repository("checkout", "--quiet", "work")
    tmp_path.joinpath("b").write_text("2")
    tmp_path.joinpath("new").write_text("")
    files, base = changed_files(tmp_path)
    assert files == ["a", "b", "moved", "new"]
    assert base.startswith("the merge base with main (")


def test_changes_on_main_are_uncommitted_ones_or_the_last_commit(
    repository: Callable[..., str], tmp_path: Path
) -> None:
    files, base = changed_files(tmp_path)
    assert files == ["b"]
    assert base.startswith("the commit before the last (")
    tmp_path.joinpath("new").write_text("")
    assert changed_files(tmp_path)[0] == ["new"]


# --- limits ---


def test_each_test_has_the_limit_of_its_folder(request: pytest.FixtureRequest) -> None:
    marker = request.node.get_closest_marker("timeout")
    assert marker.args == (TEST_S["unit"],)
    folders = {file.relative_to(TESTS).parts[0] for file in TESTS.rglob("test_*.py")}
    assert set(TEST_S) == folders
    assert min(TEST_S.values()) >= HANG_S


def test_no_test_has_a_limit_of_its_own() -> None:
    mark = re.compile(r"(^@|pytestmark = )pytest\.mark\.timeout\b", re.MULTILINE)
    assert [file for file in TESTS.rglob("*.py") if mark.search(file.read_text())] == []


# --- run and table ---

JUNIT = """\
<testsuites><testsuite name="pytest" tests="6" failures="1" errors="1" skipped="1">
<testcase classname="tests.unit.test_x" name="test_fast" time="0.1"/>
<testcase classname="tests.unit.test_x" name="test_slow[a.b]" time="61.2"/>
</testsuite></testsuites>
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a Makefile of three tiers, of which the second fails if FAILS is set."""
    for name in ("MAKEFLAGS", "MAKEOVERRIDES", "MAKE", "TESTS", "FAILS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "junit.xml").write_text(JUNIT)
    (tmp_path / "Makefile").write_text(
        "setup: ready\nready:\n\ttouch ready\n"
        "test-a:\n\tcp junit.xml build/tiers/a.xml\n\techo 'helm miss' >> $(CACHE_RECORD)\n"
        "test-b:\n\techo runs $(TESTS)\n\ttest -z '$(FAILS)'\n"
        "test-c:\n\ttouch c\n"
    )
    yield tmp_path


def test_tiers_run_in_order_and_are_counted(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Run(checkout, [Step(A), Step(B, ("tests/b/test_1.py", "tests/b/test_2.py")), Step(C)])
    assert run.all() == 0
    run.say_table()
    printed = capfd.readouterr().out
    assert "runs tests/b/test_1.py tests/b/test_2.py\n" in printed
    rows = [re.split(r"  +", line) for line in printed[printed.index("tier ") :].splitlines()]
    assert rows[0] == ["tier", "result", "passed", "failed", "skipped", "minutes", "caches"]
    assert rows[1] == ["a", "passed", "3", "2", "1", "0.0", "compiled programs: made"]
    assert [row[:2] for row in rows[2:4]] == [["b", "passed"], ["c", "passed"]]
    assert rows[4][:4] == ["total", "3", "2", "1"]
    assert printed.rstrip().endswith(
        "the 2 slowest tests\n    61.2 s  tests/unit/test_x.py::test_slow[a.b]\n     0.1 s  tests/unit/test_x.py::test_fast"
    )
    assert (checkout / "build/tiers/table.txt").read_text() in printed


def test_failed_tier_ends_the_run_with_its_status(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", "1")
    run = Run(checkout, [Step(A), Step(B), Step(C)])
    assert run.all() == 2
    assert not (checkout / "c").exists()
    words = [line.split()[:3] for line in table([Step(A), Step(B), Step(C)], run.results).splitlines()[1:4]]
    assert [row[:2] for row in words] == [["a", "passed"], ["b", "failed"], ["c", "not"]]
    assert Run(checkout, [Step(B), Step(C)]).all(keep_going=True) == 2
    assert (checkout / "c").exists()


def test_results_of_an_earlier_run_are_not_counted(checkout: Path) -> None:
    folder = checkout / "build/tiers"
    folder.mkdir(parents=True)
    (folder / "c.xml").write_text(JUNIT)
    run = Run(checkout, [Step(C)])
    run.all()
    assert run.results["c"].counts is None


def test_setup_says_whether_there_was_anything_to_do(checkout: Path) -> None:
    setup = Step(next(tier for tier in TIERS if tier.name == "setup"))
    hits = []
    for _ in range(2):
        run = Run(checkout, [setup])
        run.all()
        hits.append(run.results["setup"].caches)
    assert hits == [{"venv": False}, {"venv": True}]


def test_terminated_run_ends_its_tier_and_prints_the_table(checkout: Path) -> None:
    (checkout / "Makefile").write_text("test-a:\n\techo started; exec sleep 600\n")
    code = (
        "import sys; from pathlib import Path; from tests.tiers.figures import Tier\n"
        "from tests.tiers.runner import Run, Step\n"
        f"run = Run(Path({str(checkout)!r}), [Step(Tier('a', 'test-a', 1, 1))])\n"
        "try:\n    run.all()\nfinally:\n    run.say_table()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout is not None
    while "started" not in (line := process.stdout.readline()) or "echo" in line:
        assert process.poll() is None
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    # The sleeping program holds the other end of this pipe, too.
    assert re.search(r"\na +interrupted +0\.", process.stdout.read())
    assert time.monotonic() - start < 300
    assert process.wait() == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("flags", "goes_on"),
    [
        ("", False),
        ("k", True),
        ("kw", True),
        ("w", False),
        (" -- CHANGED=k", False),
        ("--check-symlink-times", False),
    ],
)
def test_run_goes_on_after_a_failure_with_k(flags: str, goes_on: bool) -> None:
    assert keeps_going(flags) is goes_on


def test_counts_of_no_or_half_a_file_are_none(tmp_path: Path) -> None:
    assert read_counts(tmp_path / "none.xml") is None
    (tmp_path / "half.xml").write_text(JUNIT[:80])
    assert read_counts(tmp_path / "half.xml") is None


def test_table_names_the_slowest_tests_of_all_tiers() -> None:
    slow = tuple((float(second), f"slow-{second}") for second in range(30, 20, -1))
    fast = tuple((float(second), f"fast-{second}") for second in range(25, 15, -1))
    results = {name: Result(0, 60, Counts(10, 0, 0, times), {}) for name, times in (("a", fast), ("b", slow))}
    text = table([Step(A), Step(B)], results)
    assert re.findall(r"[a-z]+-\d+", text) == [
        "slow-30", "slow-29", "slow-28", "slow-27", "slow-26", "slow-25", "fast-25", "slow-24", "fast-24", "slow-23",
    ]  # fmt: skip


def test_caches_are_hits_only_if_all_was_there(tmp_path: Path) -> None:
    file = tmp_path / "a.caches"
    file.write_text("helm hit\nhelm4 miss\nhelm4 hit\nnode-image hit\nthing miss\n")
    assert runner._caches(runner._read_caches(file)) == "compiled programs: 1 of 2 made, cluster images: hit"


def test_products_tell_whether_they_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "ROOT", tmp_path / "cache")
    monkeypatch.setenv("CACHE_RECORD", str(tmp_path / "record"))
    for _ in range(2):
        product("thing", "key", lambda folder: None)
    assert (tmp_path / "record").read_text() == "thing miss\nthing hit\n"


def test_caches_of_the_table_are_made_somewhere() -> None:
    sources = "".join(
        file.read_text() for folder in ("charts", "e2e", "report", "support") for file in (TESTS / folder).rglob("*.py")
    )
    named = [name for members in figures.CACHES.values() for name in members]
    assert len(named) == len(set(named))
    assert [name for name in named if f'"{name}"' not in sources and name not in PROGRAMS] == ["venv"]
