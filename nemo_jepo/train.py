"""The order of the rooms. Read this file first: `run_step` is the whole algorithm, `fit` repeats it.

    prompt -> rollout -> splice answer -> pack -> score -> credits -> token weights -> step -> weight sync

Every objective, supervised warm-up included, runs through the same two functions.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nemo_jepo.actor.fp8_guard import guard_fp8
from nemo_jepo.data.packing import pack
from nemo_jepo.evaluate import evaluate, grade
from nemo_jepo.metrics import merge, phase_tokens, rollout_metrics, rollout_records, with_prefix
from nemo_jepo.objective.metrics import update_metrics
from nemo_jepo.objective.registry import OBJECTIVE_TERMS, uses_verifiable_reward
from nemo_jepo.objective.tables import group_scores, weigh_tokens
from nemo_jepo.objective.update import sample_credits
from nemo_jepo.rollout.build import training_request
from nemo_jepo.rollout.sampler import SamplersLost
from nemo_jepo.setup import Rooms, collect, resume, save
from nemo_jepo.tracking import SilentTracker
from nemo_jepo.types import Prompt, Rollout, Spliced
from nemo_jepo.weight_sync import sync_weights

DONE, FAILED, INTERRUPTED = 0, 1, 75


def sample(rooms: Rooms, prompts: Sequence[Prompt], step: int) -> list[Rollout]:
    """The prompts' rollouts on every rank of the replica; those of the next max_staleness steps are begun as well."""
    config = rooms.config
    for later in range(step, min(step + config.rollout.max_staleness + 1, config.trainer.jepo.max_steps)):
        if rooms.sampler is not None and later not in rooms.begun:
            batch = prompts if later == step else rooms.own_share(rooms.stream.upcoming(later - step))
            rooms.begun[later] = rooms.sampler.submit(batch, training_request(config, later))
    return collect(rooms, rooms.begun.pop(step, None))


def splice(
    rooms: Rooms, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]
) -> tuple[list[Spliced], list[float | None] | None]:
    """Every rollout with the answer that scores it, and the verifiable rewards where the objective reads them."""
    reference = rooms.splicer.splice_reference(prompts, rollouts)
    if not OBJECTIVE_TERMS[rooms.rule.name].reads_verifiable_reward:
        return reference, None
    rewards = grade(rooms, prompts, rollouts)
    table = torch.tensor([reward or 0.0 for reward in rewards]).view(len(prompts), -1)
    verifiable = uses_verifiable_reward(rooms.rule.name, table).tolist()
    own = rooms.splicer.splice_own(prompts, rollouts)
    return [o if verifiable[r.group] else r for o, r in zip(own, reference, strict=True)], rewards


def run_step(rooms: Rooms, prompts: Sequence[Prompt], step: int, tracker: SilentTracker) -> dict[str, float]:
    """One optimizer step over this replica's prompts. This function is the whole algorithm."""
    rule, layout, actor = rooms.rule, rooms.layout, rooms.actor
    if rule.name == "sft":
        rollouts: list[Rollout] = []
        rewards = None
        sequences = rooms.splicer.supervised(prompts, rooms.config.objective.sft_target)
    else:
        with tracker.timer("weight_sync"):
            sync_weights(rooms)
        with tracker.timer("generate"):
            rollouts = sample(rooms, prompts, step)
        sequences, rewards = splice(rooms, prompts, rollouts)
    rows = pack(sequences, rooms.config.model.tokens_per_micro_batch, rooms.config.model.segment_multiple)

    with tracker.timer("logprobs"):
        scores = actor.get_inference_log_probs(rows if rollouts else [], len(sequences))
    with tracker.timer("init_logprobs"):
        reference = actor.get_init_policy_logprobs(rows, len(sequences))

    groups = group_scores(sequences, scores, reference, rewards, len(sequences) // len(prompts))
    fp8_figures = guard_fp8(actor, sequences, rows, groups, step, tracker.say) if rollouts else {}
    credits = sample_credits(rule, groups, layout.sum_over_data_parallel, layout.max_over_data_parallel)
    weights = weigh_tokens(rule, sequences, scores, reference, credits)
    with tracker.timer("train_time"):
        optim = actor.train_step(rows, weights)

    figures = update_metrics(rule, groups, credits)
    if rollouts:
        figures |= rollout_metrics(sequences, rollouts, scores, step)
        figures |= {name: (count, 1.0) for name, count in rooms.sampler_counts.items()}
        tables = {"advantage": credits.advantage, "credit": credits.credit, "answer_weight": credits.answer_weight}
        shown = sequences[: rooms.config.trainer.jepo.log_rollouts]
        readers = rooms.tokenizer.decode, rooms.splicer.marker_span
        tracker.log_rollouts(step + 1, rollout_records(prompts, shown, scores, tables, *readers))
    tracker.count_tokens(phase_tokens(sequences, rollouts, layout.data_parallel_size))
    means = merge(figures, layout.sum_over_data_parallel) | fp8_figures
    if means.get("valid_rate") == 0:
        tracker.say(f"step {step + 1}: no valid sample (answer.marker), so only the format loss and the KL act")
    if optim["skipped_step"]:
        tracker.say(f"step {step + 1}: the gradient is not finite, so the weights stay as they are")
    return with_prefix("train_rollouts", means) | with_prefix("train_optim", optim)


def fit(rooms: Rooms, folder: Path, tracker: SilentTracker, interrupted: Callable[[], bool]) -> int:
    """Train from the last checkpoint of the run, or from the initial weights, to the end.

    Args:
        folder: the run's folder.
        interrupted: asked after every step; True saves and ends.
    Returns:
        DONE, or INTERRUPTED after saving, also where no server is left to sample from; FAILED where none ever was.
    """
    loop, stream, layout = rooms.config.trainer.jepo, rooms.stream, rooms.layout
    rooms.actor.start_training(rooms.config.model.optim, loop.gradient_clip_val, loop.max_steps)
    step = resume(rooms, folder)
    tracker.rewind(step if step else -1)
    try:
        if step == 0 and loop.val_at_start:
            tracker.log(validate(rooms, step, tracker), step)
        while step < loop.max_steps and (loop.max_epochs is None or stream.epoch < loop.max_epochs):
            with tracker.timer("step_time"):
                metrics = run_step(rooms, rooms.own_share(stream.upcoming()), step, tracker)
            stream.next_batch()  # these prompts are trained on
            step += 1
            stop = layout.any_over_world(interrupted())
            ended = step == loop.max_steps or (loop.max_epochs is not None and stream.epoch >= loop.max_epochs)
            try:
                if ended or (loop.val_check_interval and step % loop.val_check_interval == 0):
                    metrics |= validate(rooms, step, tracker)
            finally:
                tracker.log(metrics, step)
            if stop or ended or (loop.save_interval and step % loop.save_interval == 0):
                with tracker.timer("save_time"):
                    save(rooms, step, last=stop or ended)
            elif rooms.checkpoints.pending:
                with tracker.timer("save_time"):
                    rooms.checkpoints.complete_if_written()
            if stop and not ended:
                return INTERRUPTED
    except SamplersLost as lost:
        tracker.say(f"no server is left to sample from, so the run saves after step {step} and ends: {lost}")
        save(rooms, step, last=True)
        return INTERRUPTED if step else FAILED
    return DONE


def validate(rooms: Rooms, step: int, tracker: SilentTracker) -> dict[str, float]:
    """Held-out figures under val_rollouts/; nothing without validation prompts."""
    if not rooms.validation:
        return {}
    with tracker.timer("validation_time"):
        figures, records = evaluate(rooms, rooms.validation)
    tracker.log_rollouts(step, records, "validation")
    return with_prefix("val_rollouts", figures)
