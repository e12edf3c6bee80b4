"""``python -m dualpipe_ext plan`` and ``verify``."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from dualpipe_ext.__main__ import app
from dualpipe_ext.schedule import CostModel, plan


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_plan_is_shown_and_written(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    result = run("plan", "dualpipe", 4, 8, "--csv", path, "--forward", 2, "--latency", 0.5)
    assert result.exit_code == 0, result.output
    schedule = plan("dualpipe", 4, 8)
    timeline = schedule.simulate(CostModel(forward=2.0, latency=0.5))
    assert f"makespan          {timeline.makespan:g}" in result.output
    assert "\nrank 3 |" in result.output
    assert f"bubble by rank    {timeline.bubble(0) / timeline.makespan:.1%}, " in result.output
    assert "live activations  5, 5, 5, 5" in result.output

    nothing = ("--forward", 0, "--backward-input", 0, "--backward-weight", 0)
    assert "makespan          0\n" in run("plan", "1f1b", 2, 4, *nothing).output

    verified = run("verify", path, "--placement", "bidirectional")
    assert verified.exit_code == 0, verified.output
    assert "4 ranks, 4 stages, 8 micro-batches; valid" in verified.output
    assert f"makespan          {schedule.simulate().makespan:g}" in verified.output


def test_mistakes_are_told_in_a_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.csv"
    broken.write_text("0F0,0B0\n1F0\n")
    for arguments, text in (
        (("plan", "dualpipe", 3, 8), "num_ranks is 3; it must be even"),
        (("plan", "1f1b", 2, 4, "--forward", -1), "forward is -1"),
        (("verify", broken), "1I0 is missing"),
        (("verify", tmp_path / "none.csv"), "No such file"),
        (("verify", broken, "--placement", "x"), 'placement is "x"'),
        (("verify", broken, "--num-stages", 2**40), "is too large"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("error: ") and text in result.stderr
        assert "Traceback" not in result.output
