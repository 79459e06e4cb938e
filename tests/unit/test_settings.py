"""Each kind of rule, by the line that it gives; docs/reference/configuration.md shows which setting has which."""

import json
import math
from dataclasses import dataclass, field, fields

import pytest

from nemo_jepo.config import compose
from nemo_jepo.config.check import check, check_fields
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.config.objectives import OBJECTIVES
from nemo_jepo.config.rules import Rule, rules_of, setting
from nemo_jepo.config.samplers import SAMPLERS
from nemo_jepo.config.schema import Config

SHAPE = {"model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 320}

COLOCATED = ["rollout=vllm_colocated", "trainer.devices=2", "rollout.vllm.num_servers=2"]


def load(*overrides: str, name: str = "demo") -> Config:
    return compose.resolve(compose.compose(name, overrides))


AHEAD = ["rollout=vllm", "rollout.max_staleness=1", "objective.importance_sampling=token_truncated"]


def error_of(*overrides: str, world_size: int = 1, name: str = "demo") -> str:
    """The one line that the given settings end in."""
    with pytest.raises(ConfigError) as caught:
        check(load(*overrides, name=name), world_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- rules that a field declares


@dataclass
class Inner:
    ratio: float | None = setting(0.5, gt=0, le=1)
    paths: list[str] = setting(list, Rule("a list of at most one path", lambda paths: len(paths) < 2, "Drop one"))


@dataclass
class Outer:
    count: int = setting(3, ge=1)
    kind: str = setting("a", choices=("a", "b"), fix="Use a")
    wait_s: float = setting(9.0, gt=0, le=15, because="the others wait 20")
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (Outer(count=0), "node.count=0: must be at least 1. Raise it."),
        (Outer(kind="c"), "node.kind='c': must be one of a, b. Use a."),
        (Outer(wait_s=16), "node.wait_s=16: must be at most 15: the others wait 20. Lower it."),
        (Outer(wait_s=0), "node.wait_s=0: must be more than 0. Raise it."),
        (Outer(wait_s=math.nan), "node.wait_s=nan: must be more than 0. Raise it."),
        (Outer(inner=Inner(ratio=1.5)), "node.inner.ratio=1.5: must be at most 1. Lower it."),
        (Outer(inner=Inner(paths=["a", "b"])), "node.inner.paths=['a', 'b']: must be a list of at most one path. "),
    ],
)
def test_a_broken_rule_is_one_line_with_the_key_of_the_walk(broken, line):
    with pytest.raises(ConfigError) as caught:
        check_fields(broken, "node.")
    assert str(caught.value).startswith(line)


def test_null_breaks_no_rule_and_a_default_may_be_made_anew():
    check_fields(Outer(inner=Inner(ratio=None)))
    assert Inner().paths is not Inner().paths
    assert [rule.text for rule in rules_of(fields(Inner)[0])] == ["more than 0", "at most 1"]


@pytest.mark.parametrize(
    "override",
    [
        "trainer.jepo.max_epochs=0",  # a bound of a setting that may be null
        "model.optim.betas=[0.9]",
        "model.fp8=e5m2",
        "data.train_path=/no/such",
        "data.prompt_template=Q",
        "data.drop_easy=0",
        "data.sampler=random",
        "data.sampler_floor=0",
        "answer.marker=' '",
        "rollout.servers=localhost:8000",
        "rollout.servers=[]",
        "rollout.servers=[https://a:1]",
        "rollout.top_p=1.5",
        "evaluation.judge.votes=4",
        "evaluation.judge.timeout_s=nan",
        "evaluation.model_verifier.votes=2",  # the class of evaluation.judge, at another key
        "evaluation.model_verifier.prompt='Is {answer} right?'",
        "evaluation.model_verifier.url=localhost:8000",
        "evaluation.judge.url='http://host/v1?key=x'",
        "evaluation.judge.url=http://host/v1/chat/completions",
        "model.optim.sched.name=step",
        "warmup.sched.name=step",  # the class of model.optim.sched, at another key
        "warmup.sched.warmup_steps=-1",
        "warmup.save_interval=-1",
    ],
)
def test_a_field_that_breaks_its_rule_is_named_as_the_user_typed_it(override):
    assert error_of(override).startswith(f"{override.partition('=')[0]}=")


def test_the_whole_line_of_a_broken_rule():
    assert error_of("warmup.sched.name=step") == (
        "warmup.sched.name='step': must be one of constant, cosine. Choose one of these."
    )


# ---- rules between settings, files and machines


@pytest.mark.parametrize(
    ("overrides", "world_size", "beginning"),
    [
        # data
        (["data=jsonl"], 1, "data.train_path=None: data=jsonl reads a file"),
        (["data.system_prompt=Think"], 1, "data.system_prompt='Think': is a turn of the chat template"),
        (["data.arithmetic.corrupted_steps=5"], 1, "data.arithmetic.corrupted_steps=5: "),
        (["data.arithmetic.min_steps=5"], 1, "data.arithmetic.min_steps=5: no chain has more than 3 steps"),
        (
            ["data.arithmetic.min_steps=1", "data.arithmetic.corrupted_steps=2"],
            1,
            "data.arithmetic.corrupted_steps=2: the shortest chain has 1 steps",
        ),
        (["data.arithmetic.right_share=0.7"], 1, "data.arithmetic.right_share + corrupted_share=1.1: "),
        (["evaluation.pass_rates=rates.jsonl"], 1, "evaluation.pass_rates='rates.jsonl': is a file of `nemo-jepo eval"),
        # curricula
        (["data.cluster_key=topic"], 1, "data.cluster_key='topic': is read by data.sampler=learning_progress"),
        (
            ["data.cluster_key=topic", "data.sampler=learning_progress"],
            1,
            "data.cluster_key='topic': is read by data.sampler=learning_progress, of rows of data=jsonl",
        ),
        (
            ["data.drop_easy=0.9", "data.sampler=learning_progress"],
            1,
            "data.drop_easy=0.9: leaves prompts out of the next epochs, and data.sampler=learning_progress has none",
        ),
        (["data.drop_easy=0.9", "objective=sft"], 1, "data.drop_easy=0.9: reads samples, and objective=sft draws"),
        (
            ["data.sampler=learning_progress", *AHEAD],
            1,
            "data.sampler='learning_progress': chooses a batch by what the one before it has shown",
        ),
        (["data.drop_easy=0.9", *AHEAD], 1, "data.drop_easy=0.9: chooses a batch by what the one before it has shown"),
        # machines
        (["trainer.devices=2"], 1, "trainer.num_nodes * trainer.devices=2: 1 processes were started"),
        (
            ["trainer.devices=3", "model.tensor_model_parallel_size=2"],
            3,
            "model.tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size=2: must divide",
        ),
        (["trainer.devices=3"], 3, "trainer.jepo.num_prompts_per_step=32: must be a multiple of the 3 "),
        (
            ["trainer.devices=3", "trainer.jepo.num_prompts_per_step=30"],
            3,
            "warmup.num_prompts_per_step=64: must be a multiple of the 3 ",
        ),
        (["model.sequence_parallel=true"], 1, "model.sequence_parallel=True: "),
        # lengths and steps
        (
            ["model.tokens_per_micro_batch=83"],
            1,
            "max(rollout.max_tokens, evaluation.max_tokens) + data.max_prompt_tokens + data.max_answer_tokens=84: "
            "a sequence must fit in a row of model.tokens_per_micro_batch=83",
        ),
        (
            ["model.tokens_per_micro_batch=84", "evaluation.max_tokens=49"],
            1,
            "max(rollout.max_tokens, evaluation.max_tokens) + data.max_prompt_tokens + data.max_answer_tokens=85: ",
        ),
        (
            ["trainer.jepo.max_steps=0", "warmup.max_steps=0"],
            1,
            "trainer.jepo.max_steps=0: makes the warm-up alone, and warmup.max_steps is 0 as well",
        ),
        # objective
        (["objective=rloo", "rollout.stop_at_marker=true"], 1, "rollout.stop_at_marker=True: objective=rloo"),
        (["objective=jepo_rl", "rollout.stop_at_marker=true"], 1, "rollout.stop_at_marker=True: objective=jepo_rl"),
        (
            ["objective=rloo", "trainer.jepo.num_generations_per_prompt=1"],
            1,
            "trainer.jepo.num_generations_per_prompt=1: ",
        ),
        (["objective=vr_cli", "objective.beta_sup=1"], 1, "objective.beta_sup=1.0: objective=vr_cli"),
        (
            ["objective=avg_logprob", "objective.reward_normalization=answer_tokens"],
            1,
            "objective.reward_normalization='answer_tokens': the reward of objective=avg_logprob",
        ),
        (["objective=nrt", "objective.no_chain=none"], 1, "objective.no_chain='none': objective=nrt reads the answer"),
        (["objective=vr_cli", "objective.no_chain=current"], 1, "objective.no_chain='current': objective=vr_cli"),
        (
            ["objective.importance_sampling=token_truncated", "objective.importance_cap=0.5"],
            1,
            "objective.importance_cap=0.5: ",
        ),
        (["rollout.temperature=0.7"], 1, "rollout.temperature=0.7: the samples would not be the policy's own"),
        # sampler
        (["rollout.top_p=0.9"], 1, "rollout.top_p=0.9: the embedded sampler draws from all tokens"),
        (["rollout=vllm", "rollout.top_p=0.9"], 1, "rollout.top_p=0.9: the bound is an expectation over the policy's"),
        (["rollout=vllm", "rollout.top_k=50"], 1, "rollout.top_k=50: the bound is an expectation over the policy's"),
        (["rollout=vllm", "rollout.max_staleness=1"], 1, "rollout.max_staleness=1: the samples come from older"),
        (
            ["rollout.max_staleness=1", "objective.importance_sampling=token_truncated"],
            1,
            "rollout.max_staleness=1: the embedded sampler takes turns with the trainer",
        ),
        (
            [*COLOCATED, "rollout.max_staleness=1", "objective.importance_sampling=token_truncated"],
            2,
            "rollout.max_staleness=1: the vllm_colocated sampler takes turns with the trainer",
        ),
        ([*COLOCATED, "rollout.servers=[http://node:8000]"], 2, "rollout.servers=['http://node:8000']: rollout=vllm_"),
        ([*COLOCATED, "trainer.num_nodes=2"], 4, "trainer.num_nodes=2: rollout=vllm_colocated starts its servers on"),
        (
            [*COLOCATED, "rollout.vllm.weight_transfer=nccl"],
            2,
            "rollout.vllm.weight_transfer='nccl': NCCL takes no two",
        ),
        (
            [*COLOCATED, "rollout.vllm.tensor_parallel_size=2"],
            2,
            "rollout.vllm.num_servers * rollout.vllm.tensor_parallel_size=4: must be trainer.devices=2",
        ),
        (
            [*COLOCATED, "objective=dpo", "rollout.sync_interval=2"],
            2,
            "rollout.sync_interval=2: servers of rollout=vllm_",
        ),
        (
            ["rollout.sync_interval=2"],
            1,
            "rollout.sync_interval=2: the samples come from older weights, and nothing in",
        ),
        (["rollout.sync_interval=0"], 1, "rollout.sync_interval=0: must be at least 1"),
        (
            [
                "rollout=vllm",
                "rollout.max_staleness=1",
                "rollout.sync_interval=null",
                "objective.importance_sampling=token_truncated",
            ],
            1,
            "rollout.sync_interval=None: sampling ahead gives its samples the newest weights",
        ),
        (["self_verification.weight=1"], 1, "self_verification.weight=1.0: objective=jepo knows no right and wrong"),
        (
            ["objective=rloo", "self_verification.weight=1", "evaluation.verify=false"],
            1,
            "self_verification.weight=1.0: weighs own answers, and evaluation.verify=false decodes none",
        ),
        (["data.group_key=group"], 1, "data.group_key='group': is a field of rows of data=jsonl, and data=arithmetic"),
        (
            ["objective=rloo", "data.verifier=judgement"],
            1,
            "data.verifier='judgement': reads the two judgements of a pair",
        ),
        (["data.arithmetic.answers=judgement"], 1, "data.arithmetic.answers='judgement': makes prompts that ask for"),
        (
            ["data.arithmetic.answers=judgement", "data.verifier=judgement"],
            1,
            "data.verifier='judgement': reads the two judgements of a pair",
        ),
        (["objective=dpo", "kl.beta=0.1"], 1, "kl.beta=0.1: objective=dpo holds on to a reference policy by dpo.beta"),
        (["objective=dpo", "objective.format_loss=paper"], 1, "objective.format_loss='paper': objective=dpo weighs"),
        (["objective=dpo", "objective.beta_sup=1"], 1, "objective.beta_sup=1.0: objective=dpo has no supervised term"),
        (
            ["objective=dpo", "trainer.jepo.num_generations_per_prompt=1"],
            1,
            "trainer.jepo.num_generations_per_prompt=1",
        ),
        ([*COLOCATED, "model.reference_policy=gpu"], 2, "model.reference_policy='gpu': it would stay on GPUs"),
        (
            ["rollout=vllm", "trainer.num_nodes=2"],
            2,
            "rollout.servers='auto': starts servers on the trainer's own node",
        ),
        # model
        (["model.fp8=hybrid"], 1, "trainer.precision='fp32': FP8 matrix products belong to bf16 training"),
        (
            ["model.hf_config=null"],
            1,
            "model.hf_config, model.hf_config_path, pretrained_checkpoint.restore_from_path=[]: exactly one",
        ),
        (
            ["model.hf_config_path=."],
            1,
            "model.hf_config, model.hf_config_path, pretrained_checkpoint.restore_from_path="
            "['model.hf_config', 'model.hf_config_path']: exactly one",
        ),
        (
            ["trainer.devices=4", "model.tensor_model_parallel_size=4"],
            4,
            "model.tensor_model_parallel_size=4: must divide num_key_value_heads=2",
        ),
    ],
)
def test_a_broken_rule_between_settings_names_its_key(overrides, world_size, beginning):
    assert error_of(*overrides, world_size=world_size).startswith(beginning)


def test_delayed_scaling_of_earlier_versions_is_refused_with_what_takes_its_place():
    assert error_of("model.fp8_recipe=delayed") == (
        "model.fp8_recipe='delayed': must be one of tensorwise, blockwise. "
        "Choose one of these; delayed is gone, and tensorwise takes its place."
    )


def test_servers_may_share_all_of_the_trainers_gpus():
    check(load(*COLOCATED), world_size=2)
    check(load(*COLOCATED, "rollout.vllm.num_servers=1", "rollout.vllm.tensor_parallel_size=2"), world_size=2)


def test_truncated_sampling_can_be_accepted_and_a_verifiable_reward_needs_no_permission():
    vllm = ("rollout=vllm", "rollout.top_p=0.9", "rollout.top_k=50")
    check(load(*vllm, "rollout.allow_truncated_sampling=true"), world_size=1)
    check(load(*vllm, "objective=rloo", "rollout.stop_at_marker=false"), world_size=1)


def test_what_nothing_reads_is_no_error():
    """beta_sup has no meaning for rloo and sft, and its default no harm; the data of sft are nobody's samples."""
    for name in ("rloo", "sft"):
        check(load(f"objective={name}", "objective.beta_sup=1.0"), world_size=1)
    check(load("objective=sft", "rollout.temperature=0.7"), world_size=1)
    check(load("rollout.temperature=0.7", "objective.importance_sampling=token_truncated"), world_size=1)
    check(load("trainer.jepo.num_generations_per_prompt=1"), world_size=1)  # jepo keeps its supervised term


def test_the_longest_sequence_may_fill_a_row_exactly():
    check(load("model.tokens_per_micro_batch=84"), world_size=1)


def test_the_shape_of_a_hugging_face_folder_is_checked_against_the_layout(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    jepo = [f"data.train_path={tmp_path}/rows.jsonl", f"pretrained_checkpoint.restore_from_path={tmp_path}"]
    layout = ["trainer.devices=3", "model.tensor_model_parallel_size=3"]
    line = error_of(*jepo, *layout, world_size=3, name="jepo")
    assert line.startswith("model.tensor_model_parallel_size=3: must divide num_attention_heads=4")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    line = error_of(*jepo, name="jepo")
    assert line.startswith("pretrained_checkpoint.restore_from_path=") and "intermediate_size" in line


# ---- what the settings say of themselves


def test_objectives_and_samplers_are_asked_for_what_they_are():
    config = load("objective=rloo", "rollout=vllm")
    assert config.objective.kind is OBJECTIVES["rloo"] and config.rollout.kind is SAMPLERS["vllm"]


def test_servers_are_auto_one_address_or_several():
    assert load("rollout=vllm").rollout.server_urls() is None
    assert load("rollout.servers=http://10.0.0.1:8000/").rollout.server_urls() == ("http://10.0.0.1:8000",)
    both = load("rollout.servers=[http://a:1,http://b:2]").rollout.server_urls()
    assert both == ("http://a:1", "http://b:2")


def test_the_run_folder_is_the_name_in_exp_dir():
    assert str(load("exp_manager.exp_dir=/out", "exp_manager.name=mine").run_folder) == "/out/mine"


@pytest.mark.parametrize("library", ["wandb", "mlflow"])
def test_a_logger_whose_library_is_missing_is_refused(library, monkeypatch):
    monkeypatch.setattr("nemo_jepo.config.check.find_spec", lambda name: None if name == library else name)
    config = load(f"exp_manager.create_{library}_logger=true")
    with pytest.raises(ConfigError, match=f"^exp_manager.create_{library}_logger=True: {library} is not installed"):
        check(config, 1)
