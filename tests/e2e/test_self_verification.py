"""A policy that learns to judge its own answers: `nemo-jepo train` as a whole, rewarded by a model on the loopback."""

import pytest

from tests.support.command_line import command, metrics, run
from tests.support.fake_judge import FakeJudge, says
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.quick

RLOO = ["objective=rloo", "objective.reward=hybrid", "hybrid.canary_interval=0", "hybrid.verifier.cache=null"]
RLOO += ["trainer.jepo.val_check_interval=0", "trainer.jepo.save_interval=0"]


def test_the_verdict_becomes_likely_and_an_evaluation_weighs_its_samples_by_it(tmp_path):
    """Every answer is right by the model, so that yes is the verdict on all but blank ones; to the rule none is."""
    learns = ["self_verification.weight=1", "trainer.jepo.max_steps=6", "model.optim.lr=1e-2"]
    with FakeJudge(says(True)) as fake:
        verifier = f"hybrid.verifier.url={fake.base}"
        run("train", tmp_path / "one", *RLOO, verifier, *learns)
        two = ["model.tensor_model_parallel_size=2", "trainer.devices=2", "trainer.jepo.max_steps=2"]
        run_ranks(2, command("train", tmp_path / "two", *RLOO, verifier, *learns, *two))
    rows = metrics(tmp_path / "one")
    assert all(row["train_rollouts/verdict_yes_rate"] > 0.6 for row in rows)
    losses = [row["train_rollouts/verdict_nll"] for row in rows]
    assert losses[-1] < 0.7 * losses[0]
    other = [row["train_rollouts/verdict_nll"] for row in metrics(tmp_path / "two")]
    assert other == pytest.approx(losses[:2], rel=1e-3)
    last = rows[-1]
    for name in ("maj_at_4", "weighted_maj_at_4", "best_at_4", "verdict_accuracy", "verdict_of_wrong"):
        assert 0.0 <= last[f"val_rollouts/{name}"] <= 1.0
    assert "val_rollouts/verdict_of_right" not in last
