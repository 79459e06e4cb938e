"""The settings of a warm-up, and of the run that goes on from a checkpoint."""

import dataclasses
from pathlib import Path

from nemo_jepo.config.schema import Config, ObjectiveConfig, PretrainedConfig, UntilConfig

SAMPLED_CHAIN = "sampled_chain"
"""warmup.sft_target whose chains the model samples."""


def warmup_config(config: Config) -> Config:
    """The supervised run before the main one: the same data, model and machines, its own length and learning rate."""
    warmup = config.warmup
    sampled = warmup.sft_target == SAMPLED_CHAIN
    return dataclasses.replace(
        config,
        warmup=dataclasses.replace(warmup, max_steps=0),
        stages=[],
        data=config.data.without_curriculum(),
        objective=_objective(config),
        kl=dataclasses.replace(config.kl, beta=0.0),
        refill=dataclasses.replace(config.refill, max_batches=1),
        model=dataclasses.replace(
            config.model, optim=dataclasses.replace(config.model.optim, lr=warmup.lr, sched=warmup.sched)
        ),
        trainer=dataclasses.replace(
            config.trainer,
            jepo=dataclasses.replace(
                config.trainer.jepo,
                max_steps=warmup.max_steps,
                max_epochs=None,
                until=UntilConfig(),
                num_prompts_per_step=warmup.num_prompts_per_step,
                num_generations_per_prompt=config.trainer.jepo.num_generations_per_prompt if sampled else 1,
                val_check_interval=0,
                val_at_start=False,
                save_interval=warmup.save_interval,
                keep_checkpoints=1,
            ),
        ),
    )


def _objective(config: Config) -> ObjectiveConfig:
    """What a warm-up maximises: the mean log-prob of its targets' tokens."""
    target = config.warmup.sft_target
    plain = dataclasses.replace(config.objective, reward_normalization="none", no_chain="none")
    if target == SAMPLED_CHAIN:
        return dataclasses.replace(
            plain, name="sft_sampled_chain", beta_sup=1.0, format_loss="none", loss_normalization="chain"
        )
    return dataclasses.replace(plain, name="sft", sft_target=target, loss_normalization="batch")


def started_from(config: Config, checkpoint: Path) -> Config:
    """The same run from another start: a checkpoint, which knows its own shape and tokenizer."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, hf_config={}, hf_config_path=None),
        pretrained_checkpoint=PretrainedConfig(restore_from_path=str(checkpoint)),
    )
