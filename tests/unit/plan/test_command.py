"""The command: configs, exit codes, what it prints, what it finds."""

import json

import pytest

from nemo_jepo import cli
from nemo_jepo.config import compose
from nemo_jepo.config.layouts import check_layout
from nemo_jepo.tools.plan.estimate import cluster_of, estimate
from nemo_jepo.tools.plan.hardware import GIB, GPUS
from nemo_jepo.tools.plan.search import best_plan
from nemo_jepo.tools.plan.workload import MeanLengths

RECIPES = {
    **{"jepo_8b": 0, "jepo_8b_fp8": 0, "jepo_8b_async": 0, "jepo_8b_colocated": 0},
    **{"jepo_70b": 8, "jepo_70b_fp8": 8, "jepo_70b_async": 8},
    **{"jepo_numina": 0, "jepo_numina_proof": 0},
}
"""conf file -> nodes that sample."""
TWO_GPUS = ["trainer.devices=1", "rollout.vllm.num_servers=1", "model.tensor_model_parallel_size=1"]
TWO_GPUS += ["model.sequence_parallel=false"]


def composed(name, *overrides):
    return compose.resolve(compose.compose(name, overrides))


def run(capsys, *arguments):
    """Exit code, the JSON object, and what went to stderr."""
    code = cli.main(["plan", *arguments, "--json"])
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if printed.out else None, printed.err


@pytest.mark.parametrize(("name", "rollout_nodes"), RECIPES.items())
def test_recipe_fits_its_machines(name, rollout_nodes, capsys):
    code, found, _ = run(capsys, "--config-name", name, "--rollout-nodes", str(rollout_nodes))
    assert (code, found["fits"], found["short_phase"]) == (0, True, None)
    assert found["num_gpus"] == (128 if "70b" in name else 8)
    assert found["parameters"] == (70_553_706_496 if "70b" in name else 8_030_261_248)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_papers_settings(name):
    config = composed(name)
    loop = config.trainer.jepo
    assert (loop.num_prompts_per_step, loop.num_generations_per_prompt) == (64, 4)
    assert (config.rollout.temperature, config.kl.beta, config.objective.format_weight) == (1.0, 1e-3, 1.0)
    assert (config.trainer.precision, config.model.optim.distributed) == ("bf16", True)
    assert config.model.fp8 == ("hybrid" if "fp8" in name else None)
    assert (config.objective.name, config.objective.beta_sup) == ("jepo", 1.0)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_can_start_from_a_folder_instead(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(composed(name).model.hf_config))
    override = [f"pretrained_checkpoint.restore_from_path={tmp_path}", "model.hf_config=null"]
    config = composed(name, *override)
    cluster = cluster_of(config, GPUS["h100"], 8, None, RECIPES[name])
    assert estimate(config, cluster, MeanLengths()).fits


@pytest.mark.parametrize("name", ["jepo_8b", "jepo_70b"])
def test_the_actor_reads_the_recipes_shape(name):
    """Llama 3.1: rotary base 500,000 with llama3 scaling by 8."""
    from nemo_jepo.actor.model import load_hf_config

    rope = load_hf_config(composed(name).model.hf_config).rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", 8.0, 500000.0)


def test_numbers_add_up(capsys):
    _, found, _ = run(capsys, "--config-name", "jepo_8b", "--price-per-gpu-hour", "3")
    assert found["step_seconds"] == pytest.approx(sum(sum(parts.values()) for parts in found["seconds"].values()))
    assert found["gpu_hours"] == pytest.approx(8 * found["step_seconds"] / 3600)
    assert found["dollars"] == pytest.approx(3 * found["gpu_hours"])
    rates, seconds = found["tokens_per_second_per_gpu"], found["seconds"]
    assert rates["training"] == pytest.approx(64 * 4 * 1536 / sum(seconds["training"].values()) / 4)
    assert rates["generation"] == pytest.approx(64 * 4 * 512 / sum(seconds["generation"].values()) / 4)
    assert set(found["memory_bytes"]) == {"log-probs", "reference log-probs", "training", "weight sync"}


def test_without_a_reference_policy_nothing_is_scored_twice(capsys):
    _, found, _ = run(capsys, "--config-name", "jepo_8b", "kl.beta=0")
    assert "reference log-probs" not in found["seconds"] and "reference log-probs" not in found["memory_bytes"]


def test_sampling_ahead_hides_the_shorter_of_sampling_and_training(capsys):
    ahead = ["rollout.max_staleness=1", "objective.importance_sampling=token_truncated"]
    _, found, _ = run(capsys, "--config-name", "jepo_8b", *ahead)
    seconds = {name: sum(parts.values()) for name, parts in found["seconds"].items()}
    training = seconds["log-probs"] + seconds["reference log-probs"] + seconds["training"]
    longer = max(seconds["generation"], training)
    assert found["step_seconds"] == pytest.approx(longer + seconds["weight sync"] + seconds["other"])


def test_a_sampler_that_keeps_its_weights_for_five_steps_costs_a_fifth_of_a_sync_and_offline_none(capsys):
    def sync(interval: str) -> float:
        _, found, _ = run(capsys, "--config-name", "jepo_8b", "objective=dpo", "kl.beta=0", interval)
        return sum(found["seconds"]["weight sync"].values())

    assert sync("rollout.sync_interval=5") == pytest.approx(sync("rollout.sync_interval=1") / 5)
    assert sync("rollout.sync_interval=null") == 0


def test_weights_of_70b_reach_all_servers_within_five_seconds_however_many_there_are(capsys):
    syncs = []
    for nodes in ("4", "8"):
        _, found, _ = run(capsys, "--config-name", "jepo_70b", "--rollout-nodes", nodes)
        assert found["trainer_gpus"] == 64
        syncs.append(sum(found["seconds"]["weight sync"].values()))
    assert syncs[0] == syncs[1] <= 5


def test_an_embedded_sampler_lives_on_the_trainers_gpus(capsys):
    code, found, _ = run(capsys, "--config-name", "demo")
    assert (code, found["num_gpus"], found["rollout_gpus"], found["rollout_memory_bytes"]) == (0, 1, 1, None)
    assert found["memory_bytes"]["generation"]["key-value cache"] > 0
    assert found["memory_bytes"]["training"]["embedded sampler"] > 0


def test_servers_on_the_trainers_gpus_take_turns_with_them(capsys):
    """While a server is awake the trainer holds its weights alone: 0.6 of 79.1 GiB are the server's."""
    _, own, _ = run(capsys, "--config-name", "jepo_8b", "trainer.devices=8", "--gpus-per-node", "16")
    code, found, _ = run(capsys, "--config-name", "jepo_8b_colocated")
    assert (code, found["num_gpus"], found["trainer_gpus"], found["rollout_gpus"]) == (0, 8, 8, 8)
    memory = found["memory_bytes"]
    assert memory["training"] == own["memory_bytes"]["training"] | {"sleeping server": 2 * GIB}
    for phase in ("weight sync", "generation"):
        assert memory[phase]["weights"] == memory["training"]["weights"]
        assert not {"gradients", "optimizer", "sleeping server"} & set(memory[phase])
    assert memory["generation"]["server"] == pytest.approx(0.6 * 79.1 * GIB)
    assert set(found["seconds"]) == {*own["seconds"], "turns"}
    assert found["seconds"]["turns"]["moving optimizer state"] == pytest.approx(
        2 * memory["training"]["optimizer"] / (0.7 * 64e9)
    )


def test_servers_that_leave_the_trainers_weights_no_room_are_to_take_less(capsys):
    too_much = "rollout.vllm.engine_args.gpu_memory_utilization=0.9"
    code, found, _ = run(capsys, "--config-name", "jepo_8b_colocated", too_much)
    assert (code, found["short_phase"]) == (1, "generation")
    assert found["try"] == "rollout.vllm.engine_args.gpu_memory_utilization=0.8"
    assert run(capsys, "--config-name", "jepo_8b_colocated", found["try"])[0] == 0


def test_one_forward_pass_is_planned_where_it_fits(capsys):
    _, small, _ = run(capsys, "--config-name", "demo")
    _, large, _ = run(capsys, "--config-name", "jepo_8b")
    assert (small["update_passes"], large["update_passes"]) == ("one", "two")
    code, asked, _ = run(capsys, "--config-name", "jepo_8b", "model.update_passes=one")
    assert (code, asked["short_phase"], asked["try"]) == (1, "training", "model.update_passes=auto")


# ---- does not fit


def test_the_table_ends_with_what_is_short_and_what_to_try(capsys):
    wide = ["model.tokens_per_micro_batch=65536"]
    assert cli.main(["plan", "--config-name", "jepo_70b", "--rollout-nodes", "8", *wide]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Does not fit: short by ") and " GiB in training on a trainer GPU. Try model." in last


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [
        (["model.optim.distributed=false", "model.reference_policy=gpu"], "model.optim.distributed=true"),
        (["model.tokens_per_micro_batch=32768"], "model.activations_checkpoint_granularity=full"),
        (
            ["model.pipeline_model_parallel_size=1", "model.tokens_per_micro_batch=4096"],
            "model.tensor_model_parallel_size=8 model.sequence_parallel=true",
        ),
        (["model.reference_policy=gpu", "model.tokens_per_micro_batch=6144"], "model.reference_policy=cpu"),
        (
            ["model.pipeline_model_parallel_size=1", "model.tokens_per_micro_batch=32768"],
            "model.activations_checkpoint_granularity=full model.tensor_model_parallel_size=8 "
            "model.sequence_parallel=true",
        ),
    ],
)
def test_what_it_says_to_try_does_fit(overrides, fix, capsys):
    arguments = ["--config-name", "jepo_70b", "--rollout-nodes", "8", "model.virtual_pipeline_model_parallel_size=null"]
    arguments += overrides
    code, found, _ = run(capsys, *arguments)
    assert (code, found["short_phase"], found["try"]) == (1, "training", fix)
    assert found["short_bytes"] > 0
    assert run(capsys, *arguments, *fix.split())[0] == 0


def test_servers_that_cannot_hold_the_weights_need_more_gpus(capsys):
    """141 GB of weights do not go into one GPU of 80; into two, with a small cache."""
    arguments = ["--config-name", "jepo_70b", "--rollout-nodes", "8", "rollout.vllm.tensor_parallel_size=1"]
    code, found, _ = run(capsys, *arguments)
    assert (code, found["short_phase"]) == (1, "generation")
    assert found["try"].split()[0] == "rollout.vllm.tensor_parallel_size=2"
    assert run(capsys, *arguments, *found["try"].split())[0] == 0


def test_two_gpus_are_too_few_for_8b_and_it_says_so(capsys):
    code, found, _ = run(capsys, "--config-name", "jepo_8b", *TWO_GPUS)
    assert (code, found["short_phase"]) == (1, "training")
    assert found["try"] == "more nodes or a GPU with more memory, or --search"


def test_a_search_that_finds_nothing_says_so(capsys):
    code, found, error = run(capsys, "--config-name", "jepo_70b", "--nodes", "2", "--rollout-nodes", "1", "--search")
    assert (code, found["fits"], found["num_gpus"]) == (1, False, 16)
    assert error == "No layout that was searched fits on --nodes 2. The nearest:\n"
    assert found["try"] == "more nodes or a GPU with more memory"


# ---- bad settings


@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        (["--config-name", "no_such"], "--config-name no_such: no such file"),
        (["--config-name", "jepo_8b", "model.sized=1"], "model.sized=1: no such key"),
        (["--config-name", "jepo_8b", "--gpu", "v100"], "--gpu='v100': known are h100"),
        (["--config-name", "jepo_8b_fp8", "--gpu", "a100"], "model.fp8='set': A100 SXM 80GB has no FP8"),
        (["--config-name", "jepo_8b", "--gpus-per-node", "4"], "trainer.devices + rollout.vllm.num_servers"),
        (["--config-name", "jepo_8b", "trainer.devices=3"], "model.tensor_model_parallel_size * pipeline"),
        (["--config-name", "jepo_70b"], "rollout.servers='auto': starts servers on the trainer's own node"),
        (["--config-name", "jepo_70b", "--nodes", "4", "--rollout-nodes", "4"], "--rollout-nodes=4: leaves none of 4"),
        (["--config-name", "jepo_70b", "--rollout-nodes", "8", "model.pipeline_model_parallel_size=3"], "model.tensor"),
        (["--config-name", "demo", "--rollout-nodes", "1"], "--rollout-nodes=1: rollout=embedded samples in"),
        (["--config-name", "jepo_8b", "--answer-tokens", "0"], "--answer-tokens=0.0: must be positive"),
        (["--config-name", "jepo_8b", "rollout.max_tokens=8192"], "max(rollout.max_tokens, evaluation.max_tokens)"),
        (
            ["--config-name", "jepo_70b", "--rollout-nodes", "8", "rollout.vllm.tensor_parallel_size=16"],
            "rollout.vllm.tensor_parallel_size=16: a server lies on one node",
        ),
        (["--config-name", "jepo", "model.hf_config={}"], "model.hf_config, "),
        (["--config-name", "jepo_8b", "++model.hf_config.model_type=gpt2"], "model.hf_config.model_type='gpt2'"),
    ],
)
def test_a_bad_setting_is_one_line_and_exit_code_2(arguments, beginning, capsys):
    assert cli.main(["plan", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(beginning) and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize("arguments", [["--nodes", "0"], ["--no-such"], ["--nodes", "x"]])
def test_a_bad_option_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", *arguments])
    assert "usage: nemo-jepo plan" in capsys.readouterr().err


def test_help_is_exit_code_0(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["plan", "--help"])
    assert "--price-per-gpu-hour" in capsys.readouterr().out


# ---- search


@pytest.mark.parametrize(
    ("name", "nodes"),
    [("jepo_8b", 1), ("jepo_8b_colocated", 1), ("jepo_70b", 4), ("jepo_70b", 16), ("jepo_70b_fp8", 24)],
)
def test_the_layout_that_a_search_finds_keeps_every_rule_and_is_faster(name, nodes):
    config = composed(name)
    best = best_plan(config, GPUS["h100"], 8, nodes, MeanLengths())
    assert best.fits
    check_layout(best.config.model, config.model.hf_config)
    assert best.config.trainer.jepo.num_prompts_per_step % best.replicas == 0
    assert best.num_gpus <= 8 * nodes
    if nodes == 1 or nodes == 16:
        as_it_is = estimate(config, cluster_of(config, GPUS["h100"], 8, nodes, RECIPES[name]), MeanLengths())
        assert best.step_seconds <= as_it_is.step_seconds


def test_what_a_search_prints_gives_the_same_plan_again(capsys):
    _, found, _ = run(capsys, "--config-name", "jepo_70b", "--nodes", "16", "--search")
    rollout_nodes = str(found["rollout_gpus"] // 8)
    code, again, _ = run(capsys, "--config-name", "jepo_70b", "--rollout-nodes", rollout_nodes, *found["overrides"])
    assert code == 0
    assert again == found


def test_experts_are_searched_over_expert_parallelism(tmp_path):
    shape = {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = composed("jepo_8b", "model.hf_config=null", f"model.hf_config_path={tmp_path}")
    best = best_plan(config, GPUS["h100"], 8, 4, MeanLengths())
    assert best.shape.num_parameters == 30_532_122_624
    assert best.fits and best.config.model.expert_model_parallel_size > 1
