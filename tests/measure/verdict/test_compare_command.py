"""`compare` as a user types it: exit codes, what it prints, its page, and that it starts light."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fasttrain.cli import main
from fasttrain.commands.compare import Compare
from fasttrain.comparison import EXIT_CODES
from fasttrain.measure.profiling.record import HostRead
from fasttrain.measure.verdict.stats import FEWEST_PAIRS
from tests.commands import strict_json
from tests.measure.verdict.comparisons import SPREAD, arm, profile, stored, stored_profile
from tests.pages.browser import Page

OPERATORS = {("aten::mm", "forward"): 100.0, ("aten::mm", "backward"): 200.0, ("aten::add_", "optimizer"): 50.0}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    wild = [9 * each for each in SPREAD]
    arms = {"textbook": arm(9000), "eager": arm(500), "auto": arm(400, SPREAD[::-1]), "wild": arm(498, wild)}
    return stored(tmp_path / "r.json", arms)


@pytest.mark.parametrize(
    ("a", "b", "code", "verdict"),
    [
        ("eager", "auto", 0, "FASTER: B is 1.2"),
        ("auto", "auto", 0, "SAME: B is 1.000 times as fast as A (1.000 to 1.000, 10 pairs, margin 1.0%)"),
        ("auto", "eager", 1, "SLOWER: B is 0.8"),
        ("eager", "wild", 3, "INCONCLUSIVE: "),
    ],
)
def test_the_exit_code_is_the_verdict(
    results: Path, a: str, b: str, code: int, verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", f"{results}:{a}", f"{results}:{b}"]) == code
    assert capsys.readouterr().out.startswith(verdict)


def test_json_is_the_whole_of_stdout(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", f"{results}:eager", str(results), "--json"]) == 0
    document = strict_json(capsys.readouterr().out)
    assert document["verdict"] == "FASTER"
    assert document["speedup"] == pytest.approx(1.25, rel=0.01)
    assert document["command"] == f"python -m fasttrain compare {results}:eager {results} --json"


def test_profiles_explain_and_a_risen_counter_fails(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = HostRead(file="train.py", line=12, what="item", per_step=1.0)
    before = stored_profile(tmp_path / "before.json", profile(OPERATORS))
    slowed = {**OPERATORS, ("aten::mm", "backward"): 270.0}
    after = stored_profile(tmp_path / "after.json", profile(slowed, host_reads=[read]))
    sides = [f"{results}:eager", f"{results}:auto"]
    assert main(["compare", *sides, "--profiles", str(before), str(after)]) == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for expected in (
        "backward 200.0 270.0 +70.0",
        "aten::mm (backward) 200.0 270.0 +70.0",
        "not explained (0% of the change) +0.0",
        "host reads a step 0 1 ROSE",
        "host reads a step: train.py:12 item, 1 a step",
    ):
        assert expected in lines


def test_the_page_is_written(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert main(["compare", f"{results}:eager", f"{results}:auto", "--html", str(out)]) == 0
    assert "FASTER" in Page(out.read_text(encoding="utf-8")).texts


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_measured(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr("fasttrain.measure.verdict.revisions.compare_revisions", measure)
    monkeypatch.setattr("fasttrain.commands.compare.compare", measure)
    for path, said in (
        (results / "page.html", f"cannot be written: {results} is no folder"),
        (tmp_path, "is a folder"),
    ):
        for asked in (["--rev", "main~1", "main"], [str(results), str(results)]):
            assert main(["compare", *asked, "--html", str(path)]) == 2
            assert f"{path}: {said}" in capsys.readouterr().err


def test_no_page_takes_the_place_of_what_is_compared(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    explained = stored_profile(tmp_path / "p.json", profile(OPERATORS))
    link = tmp_path / "link.json"
    link.symlink_to(results)
    before = results.read_bytes(), explained.read_bytes()
    sides = [f"{results}:eager", str(results)]
    for asked in (
        [*sides, "--html", str(results)],
        [*sides, "--html", str(link)],
        [*sides, "--profiles", str(explained), str(explained), "--html", str(explained)],
        [str(results), "--html", str(results)],
    ):
        assert main(["compare", *asked]) == 2
        assert f"--html {asked[-1]} is a file that is compared: name another one" in capsys.readouterr().err
    assert (results.read_bytes(), explained.read_bytes()) == before


def test_an_interrupt_while_it_is_told_costs_no_page(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fasttrain.commands.compare.print_line", interrupt)
    options = Compare(sides=(f"{results}:eager", str(results)), html=tmp_path / "new" / "page.html")
    with pytest.raises(KeyboardInterrupt):
        options.execute([])
    assert "FASTER" in (tmp_path / "new" / "page.html").read_text(encoding="utf-8")


def test_the_help_tells_how_many_blocks_a_verdict_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"with fewer than {math.ceil(FEWEST_PAIRS / 2)}, no verdict can be reached" in shown


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full, which is a disk without room")
def test_the_verdict_is_told_though_the_page_finds_no_room(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", f"{results}:eager", f"{results}:auto", "--html", "/dev/full"]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("FASTER")
    assert "the page cannot be written: No space left on device" in printed.err


def test_the_sixth_outcome_is_told_of(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = stored(tmp_path / "other.json", {"auto": arm(400)})
    assert main(["compare", str(results), str(other)]) == 3
    assert capsys.readouterr().out.startswith("TIME NOT JUDGED\n")
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "3 inconclusive or time not judged" in shown
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    assert all(outcome in readme for outcome in EXIT_CODES)


def test_names_from_a_file_do_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "eager\x1b[2J\x07\u202e"
    file = stored(tmp_path / "r.json", {hostile: arm(500), "auto": arm(400)})
    assert main(["compare", f"{file}:{hostile}", f"{file}:auto"]) == 0
    stdout = capsys.readouterr().out
    assert "\x1b" not in stdout
    assert "\\x1b[2J\\x07\\u202e" in stdout


def test_bad_requests(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for arguments, said in (
        ([], "0 files or arms were given: give two, A and B"),
        ([str(results)] * 3, "3 files or arms were given"),
        ([str(results), str(broken)], "broken.json: cannot be read as JSON"),
        ([str(results), f"{results}:compiled"], "no arm 'compiled'"),
    ):
        assert main(["compare", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_it_answers_within_two_seconds_and_without_torch(results: Path, tmp_path: Path) -> None:
    before = stored_profile(tmp_path / "before.json", profile(OPERATORS))
    code = f"""
import sys
from fasttrain.cli import main
sides = ["{results}:eager", "{results}:auto", "--profiles", "{before}", "{before}"]
assert main(["compare", *sides, "--html", "{tmp_path / "page.html"}"]) == 0
assert not {{"torch", "pandas", "pyarrow"}} & set(sys.modules)
"""
    seconds: list[float] = []
    while not seconds or (min(seconds) > 2 and len(seconds) < 5):  # other work may be in the way of one
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 2
