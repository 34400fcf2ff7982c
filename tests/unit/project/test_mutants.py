"""The tool that changes code to see whether tests notice: its changes, and a run over a package of two functions."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.mutants import __main__ as command
from tests.mutants import results
from tests.mutants.campaign import Campaign, Knowledge, Outcome, Tree
from tests.mutants.equivalent import FILE, Reviewed, read_reviewed
from tests.mutants.operators import Mutant, mutants_of
from tests.mutants.worker import replace_code

ROOT = Path(__file__).parents[3]


def changes(*lines: str) -> list[str]:
    """Return what becomes of the changed line in each mutant of a function with these lines."""
    source = "def f(a, b, c):\n" + "".join(f"    {line}\n" for line in lines)
    return [mutant.after for mutant in mutants_of("m.py", source)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("g = a < b", ["g = a <= b", "g = a >= b"]),
        ("g = a == b", ["g = a != b"]),
        ("g = (a + b) is not (c)", ["g = (a - b) is not (c)", "g = (a + b) is (c)"]),
        ("g = a not in b", ["g = a in b"]),
        ("g = 0 <= a < b", ["g = 1 <= a < b", "g = (-1) <= a < b", "g = 0 < a < b", "g = 0 > a < b", "g = 0 <= a <= b", "g = 0 <= a >= b"]),
        ("g = a and (b or c)", ["g = (b or c)", "g = a or (b or c)", "g = a", "g = a and (c)", "g = a and (b and c)", "g = a and (b)"]),
        ("g = not a", ["g = a"]),
        ("g = a - b * c", ["g = a + b * c", "g = a - b // c"]),
        ("g = a // b % c", ["g = a * b % c", "g = a // b // c"]),
        ("g = a + [b]", ["g = a", "g = [b]"]),
        ("g = -a", ["g = a"]),
        ("g = f(7, there=True)", ["g = f(8, there=True)", "g = f(6, there=True)", "g = f(7, there=False)"]),
        ("g = b if a else c", ["g = b if not (a) else c"]),
        ("g = [x for x in a if x]", ["g = [x for x in a if True]"]),
        ("g = any(a)", ["g = all(a)"]),
        ("g = max(b).all()", ["g = min(b).all()", "g = max(b).any()"]),
        ("g(a)", ["pass"]),
        ("a = b", ["pass"]),
        ("a += b", ["pass", "a -= b"]),
        ("del a[b]", ["pass"]),
        ("a.b[c] = b", ["pass"]),
        ("raise a", ["pass"]),
        ("return a", ["return None"]),
    ],
)  # fmt: skip
def test_mutants_of_a_line_are_these(line: str, expected: list[str]) -> None:
    assert sorted(changes(line)) == sorted(expected)


def test_conditions_and_loops_are_changed() -> None:
    assert changes("while a:", "    break") == ["while not (a):", "continue"]
    assert changes("for g in a:", "    if g.b:", "        continue") == ["if not (g.b):", "break"]
    assert changes("match a:", "    case 1 if b:", "        g(c)") == ["case 1 if not (b):", "pass"]


def test_condition_is_returned_the_other_way_round() -> None:
    (mutant,) = mutants_of("m.py", "def f(a) -> bool:\n    return a.b()\n")
    assert mutant.after == "return not (a.b())"


@pytest.mark.parametrize(
    "line",
    [
        '"""One, two, and 3 > 2."""',
        'g = f"{a + 1} of {b or c}"',
        "log.warning(a + 1, b=True)",
        "g: Annotated[int, Field(ge=1)] = b",
        "return None",
        "g = a",
        'g = a + " of "',
    ],
)
def test_nothing_that_only_people_read_is_changed(line: str) -> None:
    assert changes(line) == []


def test_annotations_decorators_and_type_checking_blocks_are_left_alone() -> None:
    source = "if TYPE_CHECKING:\n    a = 1\n\n\n@f(frozen=True)\nclass A:\n    b: Literal[1] | None\n\n"
    source += "    @g(1)\n    def c(self, d: Literal[2]) -> Literal[3]: ...\n"
    assert mutants_of("m.py", source) == []


def test_mutant_has_its_function_its_lines_and_its_text() -> None:
    source = "class A:\n    def b(self, c):\n        if (\n            c.ä\n            > 3\n        ):\n            return c\n"
    mutants = mutants_of("m.py", source)
    assert [m.after for m in mutants] == [">= 3", "<= 3", "> 4", "> 2", "return None"]
    first = mutants[0]
    assert (first.function, first.line, first.lines, first.operator) == ("A.b", 5, (3, 4, 5, 6), "comparison")
    assert first.source == source.replace("> 3", ">= 3")
    assert first.key == ("m.py", "A.b", "> 3", ">= 3")
    assert mutants_of("m.py", "a = 1\n" + source)[2].key == first.key


def test_constant_has_the_lines_that_use_it() -> None:
    source = "A = 1\nB = 2\n\n\nclass C:\n    d = 3\n\n    def e(self, f=4):\n        g = A\n        return self.d\n"
    lines = {mutant.before: mutant.lines for mutant in mutants_of("m.py", source)}
    assert lines == {
        "A = 1": (9,), "B = 2": (), "d = 3": (10,), "def e(self, f=4):": (9, 10), "return self.d": (10,),
    }  # fmt: skip


# --- a run ---

MODULE = """LIMIT = 3


def above(value: int) -> bool:
    return value > LIMIT


def drain(queue: list[int]) -> int:
    while queue:
        queue.clear()
    return len(queue)


def nobody(value: int) -> int:
    return value + 1
"""
GOOD = """from batch_inference.wing.module import above, drain


def test_limit():
    assert not above(3) and above(4)


def test_drain():
    assert drain([1, 2]) == 0
"""
BAD = GOOD.replace("not above(3) and above(4)", "above(9)").replace(
    "def test_drain():\n    assert drain([1, 2]) == 0\n", ""
)


def checkout(folder: Path, tests: str) -> Tree:
    """Make a checkout with one module and its tests."""
    wing, unit = folder / "job/batch_inference/wing", folder / "tests/unit/wing"
    for package in (wing.parent, wing, unit.parent.parent, unit.parent, unit):
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
    (folder / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    shutil.copytree(ROOT / "tests/mutants", folder / "tests/mutants", ignore=shutil.ignore_patterns("__pycache__"))
    (wing / "module.py").write_text(MODULE)
    (unit / "test_module.py").write_text(tests)
    return Tree(folder, ("wing/module.py",))


def outcomes_of(tree: Tree, folder: Path, until: float = math.inf) -> dict[str, str]:
    with Campaign(tree, tree.modules, folder, jobs=1) as campaign:
        campaign.learn()
        outcomes = campaign.run(tree.mutants("wing/module.py"), until)
    return {f"{outcome.mutant.before} -> {outcome.mutant.after}": outcome.status for outcome in outcomes}


def test_good_tests_notice_mutants_and_bad_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MUTANTS_PATIENCE_S", "1")
    tree = checkout(tmp_path / "one", GOOD)
    assert set(outcomes_of(tree, tmp_path / "results", until=0).values()) == {"uncovered"}
    assert "11 mutants, 7 of them to be run" in capfd.readouterr().out
    good = outcomes_of(tree, tmp_path / "results")
    assert good.pop("queue.clear() -> pass") == "timed out"
    uncovered = {name for name, status in good.items() if status == "uncovered"}
    assert uncovered == {f"return value + 1 -> return {now}" for now in ("None", "value - 1", "value + 2", "value + 0")}
    # On a busy machine a mutant may run out of its time before its test fails.
    assert {name for name, status in good.items() if status in ("killed", "timed out")} == {
        "LIMIT = 3 -> LIMIT = 4",
        "LIMIT = 3 -> LIMIT = 2",
        "return value > LIMIT -> return value >= LIMIT",
        "return value > LIMIT -> return value <= LIMIT",
        "while queue: -> while not (queue):",
        "return len(queue) -> return None",
    }
    assert len(good) == 10
    assert (tree.root / "job/batch_inference/wing/module.py").read_text() == MODULE
    assert "11 mutants, 7 of them to be run" in capfd.readouterr().out
    assert outcomes_of(tree, tmp_path / "results") == good | {"queue.clear() -> pass": "timed out"}
    assert "11 mutants, 0 of them to be run" in capfd.readouterr().out
    other = checkout(tmp_path / "two", BAD)
    bad = outcomes_of(other, tmp_path / "other")
    assert "11 mutants, 4 of them to be run" in capfd.readouterr().out
    assert outcomes_of(other, tmp_path / "other") == bad
    assert "11 mutants, 0 of them to be run" in capfd.readouterr().out
    assert {name for name, status in bad.items() if status == "survived"} == {
        "LIMIT = 3 -> LIMIT = 4",
        "LIMIT = 3 -> LIMIT = 2",
        "return value > LIMIT -> return value >= LIMIT",
    }
    assert bad["return value > LIMIT -> return value <= LIMIT"] == "killed"
    assert bad["queue.clear() -> pass"] == "uncovered"


def test_code_of_a_function_is_replaced_if_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, object] = {}
    source = "class A:\n    @property\n    def b(self): return 1\n\n\ndef c(): return 1\n"
    exec(source, namespace)  # noqa: S102 - the lines above
    monkeypatch.setitem(__import__("sys").modules, "batch_inference.m", SimpleNamespace(**namespace))
    assert replace_code("m.py", "A.b", source.replace("1", "2"))
    assert namespace["A"]().b == 2 and namespace["c"]() == 1  # type: ignore[operator]
    assert replace_code("m.py", "c", source.replace("1", "3"))
    assert namespace["c"]() == 3  # type: ignore[operator]
    assert not replace_code("m.py", "", source)
    assert not replace_code("m.py", "A.d", source)
    assert not replace_code("other.py", "c", source)


def test_only_tests_that_can_reach_a_module_are_run(tmp_path: Path) -> None:
    tree = checkout(tmp_path, GOOD)
    (tmp_path / "job/batch_inference/wing/above.py").write_text(
        "def f():\n    from batch_inference.wing import module\n"
    )
    unit = tmp_path / "tests/unit/wing"
    (unit / "test_other.py").write_text("import json\n\nfrom batch_inference.wing import nothing\n")
    (unit / "test_above.py").write_text("import batch_inference.wing.above\n")
    files = tree.test_files(["wing/module.py"])
    assert files == [f"tests/unit/wing/test_{name}.py" for name in ("module", "above")]
    assert tree.test_files(["wing/else.py"]) == []
    before = tree.digests([*files, "tests/unit/wing/test_other.py"])
    (tmp_path / "job/batch_inference/wing/above.py").write_text("from batch_inference.wing import module\n")
    after = tree.digests(before)
    assert [file for file in before if before[file] != after[file]] == ["tests/unit/wing/test_above.py"]


# --- the verdict ---


def outcome(status: str, after: str = "b") -> Outcome:
    return Outcome(Mutant("m.py", "f", 1, (1,), "constant", "a", after, after), status, tests=2)


def test_score_leaves_out_what_is_equivalent_and_nothing_else() -> None:
    reviewed = {("m.py", "f", "a", name): Reviewed(name, "so") for name in ("equivalent", "harmless")}
    some = (
        [outcome("killed")] * 5
        + [outcome("timed out")]
        + [outcome("survived", n) for n in ("equivalent", "harmless", "x")]
    )
    counts, percent = results.score([*some, outcome("uncovered")], reviewed)
    assert percent == 100 * 6 / 9
    assert counts == {
        "mutants": 10, "killed": 5, "timed out": 1, "survived": 3, "uncovered": 1, "equivalent": 1, "harmless": 1, "open": 2,
    }  # fmt: skip


def test_survivor_that_is_not_reviewed_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = SimpleNamespace(source=lambda module: "a")
    reviewed = {("m.py", "f", "a", "b"): Reviewed("equivalent", "so")}
    assert results.report([outcome("survived"), outcome("killed", "c")], reviewed, [], tree, tmp_path) == 0  # type: ignore[arg-type]
    assert "| all | 2 | 1 | 0 | 1 | 0 | 1 | 0 | 0 | 100.0 % |" in capsys.readouterr().out
    assert results.report([outcome("survived", "c")], reviewed, [], tree, tmp_path) == 1  # type: ignore[arg-type]
    assert "no test notices, and it is not reviewed: m.py:1 f, constant: survived\n- a\n+ c" in capsys.readouterr().out
    assert "-a\n+c" in (tmp_path / "survivors.txt").read_text()
    assert results.report([outcome("uncovered", "c")], reviewed, [], tree, tmp_path) == 1  # type: ignore[arg-type]
    assert results.report([outcome("killed")], {}, [("m.py", "f", "a", "z")], tree, tmp_path) == 1  # type: ignore[arg-type]


def test_tests_of_the_wing_come_first_and_the_quickest_of_them() -> None:
    names = (
        "tests/unit/wing/test_a.py::slow",
        "tests/unit/wing/test_a.py::quick",
        "tests/unit/other/test_b.py::quickest",
    )
    known = Knowledge(dict(zip(names, (2.0, 1.0, 0.5), strict=True)), {"wing/m.py": {7: set(names), 8: {names[0]}}})
    known.functions = {"wing/m.py": set(names)}

    def tests_of(function: str, *lines: int) -> list[str]:
        return known.tests_of(Mutant("wing/m.py", function, 1, lines, "constant", "a", "b", "b"))

    assert tests_of("f", 6, 7) == [names[1], names[0], names[2]]
    assert tests_of("f", 8) == [names[0]]
    assert tests_of("f", 9) == []
    assert tests_of("", 8) == [names[0]]
    assert tests_of("") == [names[1], names[0], names[2]]


def test_reviewed_mutants_are_read() -> None:
    text = "# note\n\n[a/b.py C.d]\n- x\n+ y\nequivalent: it\n  is\n\n[a/b.py]\n- x\n+ z\nharmless: speed"
    text += "\n\n[a/b.py]\n- and x\n+\nharmless: log\n"
    assert read_reviewed(text) == {
        ("a/b.py", "C.d", "x", "y"): Reviewed("equivalent", "it is"),
        ("a/b.py", "", "x", "z"): Reviewed("harmless", "speed"),
        ("a/b.py", "", "and x", ""): Reviewed("harmless", "log"),
    }
    for wrong in (
        "[a/b.py]\n- x\nequivalent: so",
        "[a/b.py]\n- x\n+ z\nequivalent:",
        f"{text}\n[a/b.py]\n- x\n+ z\nharmless: b",
    ):
        with pytest.raises(ValueError, match=r"not understood|twice"):
            read_reviewed(wrong)


def test_every_reviewed_mutant_exists() -> None:
    tree = Tree(ROOT, command.MODULES)
    there = {mutant.key for module in command.MODULES for mutant in tree.mutants(module)}
    assert set(read_reviewed(FILE.read_text(encoding="utf-8"))) - there == set()


def test_line_and_sample_choose_mutants() -> None:
    mutants = Tree(ROOT, command.MODULES).mutants("inputs/allowlist.py") + mutants_of(
        "m.py", "def f(a):\n    return a + 1\n"
    )
    options = {"line": None, "sample": None, "seed": 0}

    def chosen(**given: object) -> list[Mutant]:
        return command.chosen(mutants, SimpleNamespace(**options | given))  # type: ignore[arg-type]

    assert [m.after for m in chosen(line="m.py:2")] == ["return None", "return a - 1", "return a + 2", "return a + 0"]
    assert chosen() == mutants
    assert [m.module for m in chosen(sample=3)] == ["inputs/allowlist.py"] * 3 + ["m.py"] * 3
    assert chosen(sample=3) != chosen(sample=3, seed=1)
