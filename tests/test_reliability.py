"""RELIABILITY.md: its commands name what is there, its list of packages is pyproject's."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from organfast import page

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "RELIABILITY.md").read_text("utf-8")
EXTRAS = ("cnn", "export", "dicom", "cluster")
NOT_A_DEVICE = "research use only, not a medical device"


def promises() -> list[tuple[str, str, str]]:
    """(promise, measured, by) of each row."""
    table = TEXT.partition("## What it depends on")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    cells = [tuple(cell.strip() for cell in row) for row in rows]
    return [row for row in cells if row[0] != "promise"]  # type: ignore[misc]


def commands() -> list[str]:
    """What stands in code spans and begins with a program."""
    spans = [span for _, _, by in promises() for span in re.findall(r"`([^`]+)`", by)]
    return [span for span in spans if re.match(r"(python|make|organfast) ", span)]


def test_every_promise_has_a_figure_and_a_command() -> None:
    assert len(promises()) > 20
    for row in promises():
        assert len(row) == 3, row
        promise, measured, by = row
        assert len(measured) > 3, promise
        assert "`" in by, promise
        assert "<!--" not in f"{promise}{measured}{by}", f"no figure yet: {promise}"
        assert not re.search(r"[A-Z]_[A-Z]", measured), f"no figure yet: {promise}"


@pytest.mark.parametrize("command", commands())
def test_a_command_names_what_is_there(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text("utf-8"), re.M)
    elif arguments[:2] == ["-m", "pytest"]:
        _check_tests(arguments[2:])
    else:
        assert program == "python", command
        script, *given = arguments
        tools = [ROOT / script]
        if script == "tools/sanitize.py" and given[0] == "fuzz":
            tools.append(ROOT / "tools" / "fuzz_forest.py")
        text = "".join(tool.read_text("utf-8") for tool in tools)
        names = [word for word in given if not word.isdecimal() and not word.endswith(".json")]
        for name in names:
            assert f'"{name}"' in text, f"{script} knows no {name}"


def _check_tests(arguments: list[str]) -> None:
    """Files, functions in them, and for each word after -k a function whose name holds it."""
    where = arguments.index("-k") if "-k" in arguments else len(arguments)
    defined: list[str] = []
    for node in arguments[:where]:
        path, _, function = node.partition("::")
        of_file = re.findall(r"^def (test_\w+)", (ROOT / path).read_text("utf-8"), re.M)
        assert not function or function in of_file, node
        defined += of_file
    for word in arguments[where + 1].split(" or ") if where < len(arguments) else ():
        assert any(word in name for name in defined), word


def test_packages_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for extra in EXTRAS:
        wanted += project["optional-dependencies"][extra]
    table = TEXT.partition("## What it depends on")[2]
    listed = dict(re.findall(r"^\| (\S+) \| ([\d.]+) \| [\d.]+ \|", table, re.M))
    assert len(listed) == table.count("\n| ") - 1
    for requirement in wanted:
        name, _, least = requirement.partition(">=")
        assert listed.get(name) == least, requirement


def test_what_organfast_is_not_is_said_everywhere() -> None:
    assert NOT_A_DEVICE in TEXT
    assert NOT_A_DEVICE in page.DISCLAIMER
    done = subprocess.run(
        [sys.executable, "-m", "organfast", "--help"], capture_output=True, text=True, check=True
    )
    assert NOT_A_DEVICE in " ".join(done.stdout.split())
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert "not a medical device" in readme
    # Whatever makes a page says it at its top and at its end; what they look like is tested
    # where they are made.
    makers = [
        p
        for p in (ROOT / "organfast").rglob("*.py")
        if "organfast.page import" in p.read_text("utf-8") and " page(" in p.read_text("utf-8")
    ]
    assert {p.name for p in makers} >= {"report.py", "evaluationreport.py"}
    for maker in makers:
        assert maker.read_text("utf-8").count("{DISCLAIMER}") == 2, maker
