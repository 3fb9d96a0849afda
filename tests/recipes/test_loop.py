"""The loop of the recipe's trainings: interrupted anywhere, a training ends as one that ran through."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.tiny import loop
from recipes.tiny.loop import (
    BEST,
    CHECKPOINT,
    CURVE,
    best_average,
    cooled,
    kept_text_tokenizer,
    plot,
    read_curve,
    run,
    training_parser,
)
from recipes.tiny.understander_model import train_text_tokenizer


class Walk:
    """A training whose weights are a random walk, as dropout is; it stops at `killed_at`."""

    def __init__(self, steps: int = 9, killed_at: int | None = None, scores: tuple[float, ...] = (0.0,) * 10) -> None:
        torch.manual_seed(0)
        self.step, self.steps, self.killed_at, self.scores = 0, steps, killed_at, scores
        self.weights = torch.zeros(3)

    def run_step(self) -> dict[str, float]:
        if self.step == self.killed_at:
            raise KeyboardInterrupt
        self.weights = self.weights + torch.randn(3)
        self.step += 1
        return {"loss": 1.0}

    def evaluate(self, out: Path) -> dict[str, float]:
        return {"photos": self.scores[self.step]}

    def score(self, figures: dict[str, float]) -> float:
        return figures["photos"]

    def begin(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.weights = weights["weights"]

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "weights": self.weights, "average": {"weights": self.weights}}

    def load(self, state: dict[str, Any]) -> None:
        self.step, self.weights = state["step"], state["weights"]


@pytest.fixture(autouse=True)
def _checkpoints_at_every_step_without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "EVALUATE_EVERY", 1)
    monkeypatch.setattr(loop, "plot", lambda out: None)


def test_the_learning_rate_rises_stays_and_falls_whatever_the_number_of_steps() -> None:
    for steps in (1, 10, 1800, 2000):  # 0.3 is no binary fraction, so that the fall may begin a little below 0
        rates = [cooled(step, steps) for step in range(steps)]
        assert all(0 < rate <= 1 for rate in rates)
        assert rates[100 : int(0.69 * steps)] == [1.0] * len(rates[100 : int(0.69 * steps)])


def test_checkpoints_come_by_the_clock_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between evaluations, also a training that steps slowly loses little."""
    monkeypatch.setattr(loop, "EVALUATE_EVERY", 4)
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(Walk(killed_at=6), tmp_path)
    assert load(tmp_path / CHECKPOINT)["step"] == 6
    assert [row["step"] for row in read_curve(tmp_path)] == [4]
    assert load(tmp_path / BEST)["step"] == 4


def load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


@pytest.mark.parametrize("killed_at", [1, 6])
def test_an_interrupted_training_goes_on_with_the_same_steps(tmp_path: Path, killed_at: int) -> None:
    run(through := Walk(), tmp_path / "through")
    with pytest.raises(KeyboardInterrupt):
        run(Walk(killed_at=killed_at), tmp_path / "killed")
    torch.manual_seed(1)
    run(again := Walk(), tmp_path / "killed")
    torch.testing.assert_close(again.weights, through.weights, rtol=0, atol=0)
    rows = read_curve(tmp_path / "killed")
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert sorted(row["seconds"] for row in rows) == [row["seconds"] for row in rows]


def test_a_kill_in_the_middle_of_a_checkpoint_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(Walk(steps=2), tmp_path)

    def killed(state: object, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(Walk(), tmp_path)
    assert load(tmp_path / CHECKPOINT)["step"] == load(tmp_path / BEST)["step"] + 1 == 2
    with (tmp_path / CURVE).open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "pho')
    assert [row["step"] for row in read_curve(tmp_path)] == [1, 2, 3]
    run(Walk(), tmp_path)
    assert load(tmp_path / CHECKPOINT)["step"] == 9


def test_the_best_checkpoint_is_kept_also_by_a_resumed_training(tmp_path: Path) -> None:
    scores = (0.0, 1.0, 3.0, 2.0, 2.5, 4.0)
    run(Walk(steps=3, scores=scores), tmp_path)
    assert load(tmp_path / BEST)["step"] == 2
    run(Walk(steps=4, scores=scores), tmp_path)
    assert load(tmp_path / BEST)["step"] == 2
    run(Walk(steps=5, scores=scores), tmp_path)
    assert load(tmp_path / BEST)["step"] == 5


def test_the_curve_is_plotted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / CURVE).write_text('{"step": 1, "photos": 20.0}\n{"step": 2, "photos": 21.0, "others": 20.0}\n')
    plot(tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["curve.png"]


def test_a_training_keeps_its_text_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    first = kept_text_tokenizer(path, lambda: train_text_tokenizer(["What is this?"] * 9), None)
    again = kept_text_tokenizer(path, lambda: train_text_tokenizer(["An apple, a dog and a cat."] * 9), None)
    assert again.get_vocab() == first.get_vocab()
    (tmp_path / "later").mkdir()
    later = kept_text_tokenizer(tmp_path / "later" / path.name, lambda: train_text_tokenizer(["Nothing."]), tmp_path)
    assert later.get_vocab() == first.get_vocab()


def test_a_training_begins_with_the_best_weights_of_another_and_then_goes_on_with_its_own(tmp_path: Path) -> None:
    run(Walk(steps=3, scores=(0.0, 1.0, 3.0, 2.0)), tmp_path / "other")
    best = load(tmp_path / "other" / BEST)["average"]
    run(begun := Walk(steps=0), tmp_path / "own", tmp_path / "other")
    torch.testing.assert_close(begun.weights, best["weights"], rtol=0, atol=0)
    run(through := Walk(), tmp_path / "own", tmp_path / "other")
    run(again := Walk(), tmp_path / "own", tmp_path / "other")
    torch.testing.assert_close(again.weights, through.weights, rtol=0, atol=0)


def test_the_mean_of_two_trainings(tmp_path: Path) -> None:
    ends = []
    for number in range(2):
        out = tmp_path / str(number)
        run(Walk(steps=3 + number, scores=tuple(map(float, range(10)))), out)
        ends.append(best_average(out)["weights"])
    assert not torch.equal(*ends)
    torch.testing.assert_close(best_average(tmp_path / "0", tmp_path / "1")["weights"], (ends[0] + ends[1]) / 2)


def test_only_a_training_with_weights_can_be_begun_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(Walk(steps=1), tmp_path)
    parser = training_parser("Train.", tmp_path, 1, 1, 1.0)
    assert parser.parse_args(["--start", str(tmp_path)]).start == tmp_path
    assert parser.parse_args([]).start is None
    with pytest.raises(SystemExit):
        parser.parse_args(["--start", str(tmp_path / "none")])
    assert f"{tmp_path / 'none'} has no best.pt" in capsys.readouterr().err
