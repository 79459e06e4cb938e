"""Read this file first: `run_step` is the whole algorithm, `fit` repeats it, `main` is the command.

    prompt -> rollout -> splice answer -> score -> sample weights -> token weights -> step -> weight sync

Every objective, supervised warm-up included, runs through the same functions.
"""

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import torch

from nemo_jepo.actor.fp8_guard import guard_fp8
from nemo_jepo.actor.heartbeat import heartbeat
from nemo_jepo.actor.parallel import Layout, init_distributed, init_model_parallel, on_first_rank
from nemo_jepo.actor.scoring import score
from nemo_jepo.checkpoint.format import latest_checkpoint, passed_over, step_of, sweep
from nemo_jepo.checkpoint.run_lock import only_run_in
from nemo_jepo.config.compose import to_yaml
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.parts import Part, parts_of
from nemo_jepo.config.reading import read_json
from nemo_jepo.config.schema import Config
from nemo_jepo.config.warmup import started_from
from nemo_jepo.data.dataset import PromptSplits
from nemo_jepo.evaluate import evaluate
from nemo_jepo.grading import VerifierFooled
from nemo_jepo.metrics import (
    merge,
    phase_tokens,
    rollout_records,
    step_metrics,
    with_prefix,
    without_valid_sample,
)
from nemo_jepo.objective.records import SampleWeights, Scored
from nemo_jepo.objective.registry import uses_verifiable_reward
from nemo_jepo.objective.update import reward_spread, sample_weights, token_weights
from nemo_jepo.refill import Refill, Sampled
from nemo_jepo.rollout.build import OwnServers
from nemo_jepo.rollout.sampler import SamplersLost, SamplingStopped
from nemo_jepo.setup import Trainer, build, resume, save
from nemo_jepo.tracking import SilentTracker, Tracker, metrics_of
from nemo_jepo.types import Prompt, Rollout, SplicedBatch
from nemo_jepo.utils import early_signals
from nemo_jepo.utils.exit_codes import DONE, FAILED, INTERRUPTED
from nemo_jepo.utils.files import write_atomically
from nemo_jepo.weight_sync import sync_for_training


def run_step(t: Trainer, step: int, tracker: SilentTracker) -> dict[str, float]:
    """One optimizer step over the next batch of prompts. This function is the whole algorithm."""
    prompts = t.upcoming()
    rollouts = sample(t, prompts, tracker)
    scored = score(t.actor, splice(t, prompts, rollouts), tracker.timer, for_update=t.refill is None)
    note(t, prompts, scored)
    if t.refill is not None:  # prompts whose samples are alike give way to others
        prompts, rollouts, scored = refill(t, t.refill, Sampled(prompts, rollouts, scored), step, tracker)
    fp8_error = guard_fp8(t.actor, scored, step, tracker.say) if rollouts else {}
    weights = sample_weights(t.rule, scored.groups, t.layout.sum_over_data_parallel, t.layout.max_over_data_parallel)
    weight_of_tokens = token_weights(t.rule, scored, weights)
    with tracker.timer("train_time"):
        optim = t.actor.train_step(scored.rows, weight_of_tokens, scored.graph)
    if rollouts and scored.rows:
        tracker.say_once("passes", passes_line(t, scored))
    metrics = report_rollouts(t, prompts, rollouts, scored, weights, step, tracker)
    return metrics | with_prefix("train_rollouts", fp8_error) | report_update(optim, step, tracker)


def sample(t: Trainer, prompts: Sequence[Prompt], tracker: SilentTracker, ahead: int = 0) -> list[Rollout]:
    """G chains of thought for every prompt of the stream's next batch, or of one so many ahead; [] where none are
    needed."""
    if t.objective.supervised:
        return []
    with tracker.timer("weight_sync"):
        sync_for_training(t)
    with tracker.timer("generate"):
        return t.rollouts.take(prompts, t.stream.batches_seen + ahead, ahead)


def splice(t: Trainer, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> SplicedBatch:
    """c_i + a* for every rollout, or c_i + a_i where a verifier rewards it; a* without a chain where it is read."""
    if t.objective.supervised:
        return SplicedBatch(sequences=t.splicer.supervised(prompts, t.config.objective.sft_target), group_size=1)
    batch = SplicedBatch(
        sequences=t.splicer.splice_reference(prompts, rollouts),
        group_size=len(rollouts) // len(prompts),
        no_chain=t.splicer.supervised(prompts, "marked_answer") if t.rule.no_chain != "none" else None,
        by_token=t.objective.reads_tokens,
    )
    if not t.objective.reads_verifier:
        return batch
    rewards = t.reward.of(prompts, rollouts, t.actor.num_steps)
    table = torch.tensor([reward or 0.0 for reward in rewards]).view(len(prompts), -1)
    verifiable = uses_verifiable_reward(t.rule.name, table, t.rule.unverifiable).tolist()
    own = t.splicer.splice_own(prompts, rollouts)
    sequences = [o if verifiable[r.group] else r for o, r in zip(own, batch.sequences, strict=True)]
    if t.verdicts is not None:
        sequences = t.verdicts.targets(prompts, sequences, rewards)
    return replace(batch, sequences=sequences, rewards=rewards)


def refill(t: Trainer, rule: Refill, first: Sampled, step: int, tracker: SilentTracker) -> Sampled:
    """The first batch without the prompts whose samples are alike, and prompts of later batches in their place."""

    def draw(ahead: int) -> Sampled:
        prompts = t.upcoming(ahead)
        rollouts = sample(t, prompts, tracker, ahead)
        scored = score(t.actor, splice(t, prompts, rollouts), tracker.timer)
        note(t, prompts, scored)
        return Sampled(prompts, rollouts, scored)

    return rule.fill(first, draw, partial(reward_spread, t.rule), t.actor, t.layout, step)


def note(t: Trainer, prompts: Sequence[Prompt], scored: Scored) -> None:
    """Take down what a batch shows of its prompts, where the order of the next ones depends on it."""
    if t.lessons is not None:
        t.lessons.note(prompts, scored.groups)


def learn(t: Trainer) -> dict[str, float]:
    """Tell the stream what the step has shown, once its batches are handed out; metrics of the order that follows."""
    if t.lessons is not None:
        t.stream.learn(t.lessons.take())
    return with_prefix("train_rollouts", t.stream.metrics())


def report_rollouts(
    t: Trainer,
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    scored: Scored,
    weights: SampleWeights,
    step: int,
    tracker: SilentTracker,
) -> dict[str, float]:
    """The batch's metrics, the same on every rank; a few of its rollouts go to the tracker, token by token."""
    if rollouts:
        tables = {name: getattr(weights, name) for name in ("advantage", "policy_weight", "answer_weight")}
        shown = scored.sequences[: t.config.trainer.jepo.log_rollouts]
        readers = t.tokenizer.decode, t.splicer.marker_span
        tracker.log_rollouts(step + 1, rollout_records(prompts, shown, scored.policy, tables, *readers))
    tracker.count_tokens(phase_tokens(scored.sequences, rollouts, t.layout.data_parallel_size))
    metrics = step_metrics(t.rule, scored, weights, rollouts, step, t.rollouts.counts)
    if t.refill is not None:
        metrics |= t.refill.metrics()
    metrics |= t.reward.metrics()
    means = merge(metrics, t.layout.sum_over_data_parallel)
    if means.get("valid_rate") == 0:
        tracker.say(f"step {step + 1}: {without_valid_sample(t.rule, means)}")
    if means.get("cut_off_rate", 0) > 0.5:
        tracker.say_once("cut_off", "most completions are cut off (cut_off_rate). Raise rollout.max_tokens.")
    return with_prefix("train_rollouts", means)


def passes_line(t: Trainer, scored: Scored) -> str:
    """How an update computes its log-probs and gradients here, in words."""
    model, passes = t.config.model, "one forward pass" if scored.graph else "two forward passes"
    line = f"an update makes {passes} of the policy (model.update_passes={model.update_passes})"
    if model.share_prompts and not t.actor.row_shape.share_prompts:
        line += "; every sample computes its own prompt (model.share_prompts, under context parallelism)"
    return line


def report_update(optim: dict[str, float], step: int, tracker: SilentTracker) -> dict[str, float]:
    """The optimizer's metrics; an update that was left out is said."""
    if optim["skipped_step"]:
        tracker.say(f"step {step + 1}: the gradient is not finite, so the weights stay as they are")
    return with_prefix("train_optim", optim)


def fit(t: Trainer, folder: Path, newest: Path | None, tracker: SilentTracker, interrupted: "Interrupt") -> int:
    """Train from the newest checkpoint of the run, or from the initial weights, to the end.

    Args:
        folder: the run's folder.
        newest: its newest whole checkpoint.
        interrupted: asked after every step and between the batches of a validation; True saves and ends.
    Returns:
        DONE, or INTERRUPTED after saving, also where no server is left to sample from; FAILED where none ever was.
    """
    loop = t.config.trainer.jepo
    t.actor.start_training(t.config.model.optim, loop.gradient_clip_val, loop.max_steps)
    step, logged = resume(t, newest), dict[str, float]()
    interrupted.listen()
    tracker.rewind(step if step else -1)
    metrics = unreported_metrics(folder, step)  # of a step that is done and not in metrics.jsonl yet
    if metrics is None:
        forget_unreported(t, folder)  # those of a step whose checkpoint was never written
    if metrics is None and step == 0 and loop.val_at_start:
        metrics = {}
    try:
        if metrics is not None:
            logged = metrics | validate(t, step, tracker, interrupted)
            tracker.log(logged, step)
            metrics = None
            forget_unreported(t, folder)
        while not has_ended(t, step, logged):
            with tracker.timer("step_time"):
                metrics = run_step(t, step, tracker)
            for _ in range(1 if t.refill is None else t.refill.num_batches):
                t.stream.next_batch()  # these prompts are trained on
            metrics |= learn(t)
            step += 1
            if has_ended(t, step, metrics) or (loop.val_check_interval and step % loop.val_check_interval == 0):
                metrics |= validate(t, step, tracker, interrupted)
            tracker.log(metrics, step)
            logged, metrics = metrics, None
            ended, stop = has_ended(t, step, logged), t.layout.any_over_world(interrupted())
            save_if_due(t, step, stop or ended, tracker)
            if stop and not ended:
                return INTERRUPTED
    except (SamplersLost, SamplingStopped, VerifierFooled) as error:
        if isinstance(error, SamplersLost):
            tracker.say(f"no server is left to sample from, so the run saves after step {step} and ends: {error}")
        if isinstance(error, VerifierFooled):
            tracker.say(f"the run saves after step {step} and ends: {error}")
        if step and metrics is not None:
            keep_unreported(t, folder, step, metrics)
        with tracker.timer("save_time"):
            save(t, step, last=True)
        if isinstance(error, VerifierFooled) or (isinstance(error, SamplersLost) and not step):
            return FAILED
        return INTERRUPTED
    if logged and loop.until.metric not in (None, *logged):
        tracker.say(f"trainer.jepo.until.metric: step {step} has no {loop.until.metric}, and none ended the run by it")
    return DONE


def has_ended(t: Trainer, step: int, metrics: Mapping[str, float]) -> bool:
    """Whether the run has made all its steps or epochs, or the last step's metrics end it."""
    loop = t.config.trainer.jepo
    if step >= loop.max_steps or (loop.max_epochs is not None and t.stream.epoch >= loop.max_epochs):
        return True
    return step > 0 and loop.until.metric is not None and t.layout.any_over_world(loop.until.is_met(metrics))


def save_if_due(t: Trainer, step: int, last: bool, tracker: SilentTracker) -> None:
    """A checkpoint where the run ends or its interval says so; else a look after the one that is being written."""
    interval = t.config.trainer.jepo.save_interval
    if last or (interval and step % interval == 0):
        with tracker.timer("save_time"):
            save(t, step, last)
    elif t.checkpoints.pending:
        with tracker.timer("save_time"):
            t.checkpoints.complete_if_written()


def validate(t: Trainer, step: int, tracker: SilentTracker, stop: Callable[[], bool]) -> dict[str, float]:
    """Held-out metrics under val_rollouts/; nothing without validation prompts. Raises as `evaluate` does."""
    if not t.validation:
        return {}
    with tracker.timer("validation_time"):
        found = evaluate(t, t.validation, stop)
    tracker.log_rollouts(step, found.records, "validation")
    return with_prefix("val_rollouts", found.metrics)


# ---- a step whose validation was interrupted ------------------------------------------------------------------------


def keep_unreported(t: Trainer, folder: Path, step: int, metrics: dict[str, float]) -> None:
    """Write down a step's own metrics, for the start that validates it; before its checkpoint, which it waits for."""
    if t.layout.rank == 0:
        write_atomically(folder / "unreported.json", json.dumps({"step": step, "metrics": metrics}))


def unreported_metrics(folder: Path, step: int) -> dict[str, float] | None:
    """The own metrics of this step, if an earlier start ended during its validation.

    Raises:
        ConfigError: they cannot be read.
    """
    path = folder / "unreported.json"
    kept = read_json("exp_manager.name", path) if path.exists() else {}
    return kept.get("metrics") if kept.get("step") == step else None


def forget_unreported(t: Trainer, folder: Path) -> None:
    """They are in metrics.jsonl now."""
    if t.layout.rank == 0:
        (folder / "unreported.json").unlink(missing_ok=True)


# ---- the command ----------------------------------------------------------------------------------------------------


class Interrupt:
    """Set by SIGTERM, SIGINT or SIGUSR1; the run finishes its step, saves and ends. A second SIGINT ends at once."""

    def __init__(self) -> None:
        self._received = False

    def listen(self) -> None:
        """From here on; until then a signal ends the run's start, and nothing is lost."""
        for number in early_signals.ENDING:
            signal.signal(number, self._remember)
        early_signals.release()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True

    def __call__(self) -> bool:
        return self._received


def main(config: Config) -> int:
    """The warm-up and the stages that are asked for, then the main run; each starts from the one before it, and all
    resume where they were."""
    init_distributed()
    init_model_parallel(config.model)
    interrupt, folder, splits, parts = Interrupt(), config.run_folder, PromptSplits(), parts_of(config)
    servers_of_all = OwnServers(folder, [part.config for part in parts])
    with heartbeat(config.trainer.stuck_timeout_s), only_run_in(folder), servers_of_all as servers:
        start, left = those_to_run(parts, folder)
        for place, settings in left:
            settings = settings if start is None else started_from(settings, start)
            code = run(settings, folder / place, servers, splits, interrupt)
            if code:
                return code
            start = newest_on_every_rank(folder / place / "checkpoints")
        return DONE


def those_to_run(parts: Sequence[Part], folder: Path) -> tuple[Path | None, Sequence[Part]]:
    """The newest part of a run that has begun, and all after it; before them the checkpoint that it started from.

    A part that another one started from is over, whatever its end is now.
    """
    newest = [newest_on_every_rank(folder / part.folder / "checkpoints") for part in parts]
    first = max((number for number, checkpoint in enumerate(newest) if checkpoint is not None), default=0)
    start = newest[first - 1] if first else None
    if first and start is None:
        gone, rule = folder / parts[first - 1].folder, "has no checkpoint, and a later part of the run started from it"
        raise ConfigError("exp_manager.name", str(gone), rule, "Put it back, or choose another name")
    return start, parts[first:]


def run(config: Config, folder: Path, servers: OwnServers, splits: PromptSplits, interrupt: Interrupt) -> int:
    """One training run from where it was to its end; nothing is built where it has ended. Returns `fit`'s code."""
    layout, steps = Layout(), config.trainer.jepo.max_steps
    newest = newest_on_every_rank(folder / "checkpoints")
    done = 0 if newest is None else step_of(newest)
    reported = unreported_metrics(folder, done) is None
    if newest is not None and not config.exp_manager.resume_if_exists:
        fix = "Choose another name, or exp_manager.resume_if_exists=true"
        raise ConfigError("exp_manager.name", config.exp_manager.name, f"{newest} exists", fix)
    until = config.trainer.jepo.until
    met = done > 0 and until.metric is not None and until.is_met(on_first_rank(partial(metrics_of, folder, done)))
    if (done >= steps or met) and reported:
        return DONE
    t = build(config, folder, layout, servers, splits)
    loop = config.trainer.jepo
    num_samples = loop.num_prompts_per_step * loop.num_generations_per_prompt
    tracker = Tracker(folder, config.exp_manager, steps, num_samples, done + 1) if layout.rank == 0 else SilentTracker()
    with closing(t), tracker:
        tracker.save_config(to_yaml(t.config))
        if layout.rank == 0:
            tidy(folder / "checkpoints", tracker)
        return fit(t, folder, newest, tracker, interrupt)


def newest_on_every_rank(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint of a run as rank 0 sees it, None where it has none; see latest_checkpoint."""
    return on_first_rank(partial(latest_checkpoint, checkpoints))


def tidy(checkpoints: Path, tracker: SilentTracker) -> None:
    """Say which newer checkpoints are passed over, and delete what killed runs left."""
    for line in passed_over(checkpoints):
        tracker.say(line)
    for rest in sweep(checkpoints):
        tracker.say(f"removed {rest}, which a killed run left")
