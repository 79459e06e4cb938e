"""The warm-up's settings follow from the run's."""

from pathlib import Path

from nemo_jepo.config.compose import compose, resolve
from nemo_jepo.config.parts import parts_of
from nemo_jepo.config.warmup import started_from, warmup_config


def settings(*overrides: str):
    return resolve(compose("demo", ["warmup.max_steps=30", "trainer.jepo.save_interval=2", *overrides]))


def test_a_warm_up_is_supervised_and_has_its_own_length_and_learning_rate():
    warmup = warmup_config(settings("warmup.lr=3e-4", "warmup.num_prompts_per_step=16", "kl.beta=0.1"))
    assert warmup.objective.name == "sft" and warmup.kl.beta == 0
    assert (warmup.trainer.jepo.max_steps, warmup.trainer.jepo.num_prompts_per_step) == (30, 16)
    assert warmup.model.optim.lr == 3e-4
    assert warmup.warmup.max_steps == 0


def test_answers_behind_sampled_chains_are_a_warm_up_that_samples_and_trains_no_chain():
    warmup = warmup_config(settings("warmup.sft_target=sampled_chain", "objective=nrt"))
    objective = warmup.objective
    assert (objective.name, objective.format_loss, objective.beta_sup) == ("sft_sampled_chain", "none", 1.0)
    assert (objective.no_chain, objective.kind.supervised, warmup.kl.beta) == ("none", False, 0.0)
    run = settings("warmup.sft_target=sampled_chain")
    assert warmup.trainer.jepo.num_generations_per_prompt == run.trainer.jepo.num_generations_per_prompt > 1
    assert warmup_config(settings()).trainer.jepo.num_generations_per_prompt == 1


def test_it_writes_no_checkpoints_on_its_way_unless_asked():
    assert warmup_config(settings()).trainer.jepo.save_interval == 0
    assert warmup_config(settings("warmup.save_interval=7")).trainer.jepo.save_interval == 7


def test_the_main_run_starts_from_the_warm_ups_checkpoint_and_its_shape():
    warmup, main = parts_of(settings("trainer.jepo.max_steps=5"))
    assert (warmup.folder, main.folder) == ("warmup", "")
    main = started_from(main.config, Path("/run/warmup/checkpoints/step_000030"))
    assert main.pretrained_checkpoint.restore_from_path == "/run/warmup/checkpoints/step_000030"
    assert main.model.hf_config == {} and main.model.hf_config_path is None
    assert main.warmup.max_steps == 0 and main.trainer.jepo.max_steps == 5
