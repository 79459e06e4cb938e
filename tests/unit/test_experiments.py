"""Named sets of runs: what they consist of, that they go on where they stopped, and the table that they end in."""

import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest

from nemo_jepo.config import compose
from nemo_jepo.config.errors import ConfigError
from nemo_jepo.objective.registry import LIKELIHOOD_TERMS
from nemo_jepo.tools import experiments
from nemo_jepo.tools.experiments import load_experiment, main, only, plan_runs, write_results

MAIN = {
    "mini_verifiable": {"jepo", "jepo_single", "rloo", "sft", "sft_chain_of_thought"},
    "mini_semi": {"jepo", "jepo_rl", "rloo"},
    "mini_unverifiable": {"jepo", "jepo_beta_sup_0", "sft"},
    "mini_family_unverifiable": (LIKELIHOOD_TERMS.keys() - {"jepo_rl"}) | {"sft"},
    "mini_family_verifiable": LIKELIHOOD_TERMS.keys() | {"rloo", "sft"},
}
PAPER = ("paper_math", "paper_numina", "paper_numina_proof", "paper_family")
SHAPE = {"model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 320}
SMALL = """
config: jepo_tiny
regime: verifiable
seeds: [3, 4]
overrides: [trainer.jepo.max_steps=2]
arms:
  jepo: []
  rloo: [objective=rloo]
"""


def small_file(folder: Path, text: str = SMALL) -> str:
    file = folder / "small.yaml"
    file.write_text(text)
    return str(file)


# ---- the sets of conf/experiment


def needed(config, folder: Path) -> list[str]:
    """Overrides that a recipe for a real model leaves to its user: the model's folder, and files of published data."""
    if not config.startswith("smollm2"):
        return []
    (folder / "config.json").write_text(json.dumps(SHAPE))
    (folder / "rows.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    generated = config in ("smollm2_chain_sum", "smollm2_letter_counting")
    rows = [] if generated else [f"data.train_path={folder}/rows.jsonl"]
    return [f"pretrained_checkpoint.restore_from_path={folder}", *rows]


@pytest.mark.parametrize("name", [name for name in experiments.names() if name not in PAPER])
def test_every_run_of_a_set_passes_every_check(name, tmp_path):
    whole = only(load_experiment(name), [2], [])
    given = needed(whole.config, tmp_path)
    runs = plan_runs(name, whole, [f"exp_manager.exp_dir={tmp_path}", *given])
    assert len({run.folder for run in runs}) == len(runs)
    for seed in whole.seeds:
        of_seed = [run for run in runs if run.seed == seed]
        arms = [run for run in of_seed if run.arm != "warmup"]
        warmups = ["warmup"] * (compose.compose(whole.config, [*whole.overrides, *given]).warmup.max_steps > 0)
        assert [run.arm for run in of_seed] == [*warmups, *whole.arms]
        assert {(run.config.data.seed, run.config.model.seed) for run in of_seed} == {(seed, seed)}
        assert len({str(run.config) for run in arms}) == len(arms), "two arms are the same"


@pytest.mark.parametrize("name", MAIN)
def test_a_main_comparison_has_the_arms_and_seeds_of_the_claims(name):
    whole = load_experiment(name)
    assert set(whole.arms) == MAIN[name]
    assert len(whole.seeds) == 3


@pytest.mark.parametrize("name", PAPER)
def test_a_full_size_set_is_complete_but_for_model_and_data(name, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1", "answer": "2"}\n')
    whole = only(load_experiment(name), [1], [])
    runs = plan_runs(name, whole, [f"data.train_path={rows}", f"data.validation_path={rows}"])
    assert [run.arm for run in runs] == list(whole.arms)
    for run in runs:
        assert run.command()[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
        assert run.config.model.hf_config["num_hidden_layers"] == 32
        loop = run.config.trainer.jepo
        assert (loop.num_generations_per_prompt, loop.num_prompts_per_step) == (4, 64)
        assert run.config.kl.beta == (0 if run.arm == "sft_sampled_chain" else 1e-3)


def test_an_arm_differs_from_its_siblings_in_its_overrides_alone():
    for run in plan_runs("mini_n", only(load_experiment("mini_n"), [1], []), []):
        loop, manager = run.config.trainer.jepo, run.config.exp_manager
        if run.arm != "warmup":
            assert (f"n_{loop.num_generations_per_prompt}", manager.name) == (run.arm, f"mini_n/{run.arm}/seed_1")
            loop.num_generations_per_prompt, manager.name = 4, "mini_verifiable"
            plain = compose.compose("mini_verifiable", ["data.seed=1", "model.seed=1"])
            assert run.config == compose.resolve(plain)


def test_overrides_of_the_command_line_reach_every_run():
    runs = plan_runs("smoke", load_experiment("smoke"), ["model.optim.lr=0.5", "warmup.max_steps=7"])
    assert {run.config.model.optim.lr for run in runs} == {0.5}
    assert all("step_000007" in " ".join(run.command()) for run in runs if run.arm != "warmup")


def test_an_arm_may_have_a_warm_up_of_its_own_behind_that_of_the_set(tmp_path):
    text = SMALL.replace("max_steps=2]", "max_steps=2, warmup.max_steps=7]")
    file = small_file(tmp_path, text.replace("jepo: []", "jepo: [warmup.max_steps=3, warmup.sft_target=sampled_chain]"))
    commands = {run.arm: run.command() for run in plan_runs("small", only(load_experiment(file), [3], []), [])}
    values = {
        arm: dict(it.split("=", 1) for it in command if it.startswith(("warmup.", "pretrained_checkpoint.")))
        for arm, command in commands.items()
    }  # of a key that is given twice, the last
    assert {arm: found["warmup.max_steps"] for arm, found in values.items()} == {
        "warmup": "7",
        "jepo": "3",
        "rloo": "0",
    }
    assert values["jepo"]["warmup.sft_target"] == "sampled_chain"
    for arm in ("jepo", "rloo"):
        assert "step_000007" in values[arm]["pretrained_checkpoint.restore_from_path"]


# ---- mistakes

WRONG = {
    "no such set": (["no_such"], "experiment='no_such': no such set or file. Choose one of mini_beta, "),
    "no such arm": (["smoke", "--arms", "jepo,sft"], "--arms='sft': no such arm. Choose among jepo, rloo."),
    "a typo in a key": (["smoke", "trainer.jepo.max_stepz=3"], "trainer.jepo.max_stepz=3: no such key."),
    "a typo in the file": (["arm: {}"], "experiment='{folder}/small.yaml': Key 'arm' not in 'Experiment'"),
    "no arms": (["config: demo\nregime: verifiable"], "experiment='{folder}/small.yaml': Structured config of type"),
    "an arm in the warm-up's folder": (
        ["config: demo\nregime: verifiable\narms: {warmup: []}"],
        "experiment='{folder}/small.yaml': an arm is called warmup.",
    ),
    "a wrong override of one arm": (
        ["config: demo\nregime: verifiable\narms: {a: [], b: [objective=jepoo]}"],
        "objective=jepoo",
    ),
    "several nodes": (
        ["config: jepo_70b\nregime: verifiable\narms: {a: []}"],
        "trainer.num_nodes=8: the runs of a set are started one at a time on one node.",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_one_line_before_anything_runs(mistake, tmp_path, monkeypatch):
    (first, *rest), words = WRONG[mistake]
    name = small_file(tmp_path, first) if ":" in first else first
    monkeypatch.setattr(experiments, "_train", lambda run: pytest.fail("a run was started"))
    with pytest.raises(ConfigError) as caught:
        main([name, f"exp_manager.exp_dir={tmp_path}", *rest])
    assert str(caught.value).startswith(words.replace("{folder}", str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == ([tmp_path / "small.yaml"] if ":" in first else [])


def test_help_names_the_sets(capsys):
    assert main(["--help"]) == 0
    assert "Sets: mini_beta, " in capsys.readouterr().out


# ---- order, resumption, results: with a process that takes no time


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The runs that were started, by a stand-in for their processes that writes two steps of metrics."""
    started: list[str] = []

    def train(run: experiments.Run) -> int:
        started.append(str(run))
        lines = [{"step": step, "timers/step_time": 1.0, "val_rollouts/accuracy": run.seed + step} for step in (0, 1)]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0

    monkeypatch.setattr(experiments, "_train", train)
    return started


ALL = ["jepo, seed 3", "rloo, seed 3", "jepo, seed 4", "rloo, seed 4"]


def table(folder: Path) -> list[dict]:
    return pyarrow.parquet.read_table(folder / "small" / "results.parquet").to_pylist()


def test_the_table_has_a_row_for_every_metric_of_every_step_of_every_run(tmp_path, trained):
    assert main([small_file(tmp_path), f"exp_manager.exp_dir={tmp_path}"]) == 0
    assert trained == ALL
    assert table(tmp_path) == [
        {
            "experiment": "small",
            "regime": "verifiable",
            "arm": arm,
            "seed": seed,
            "step": step,
            "metric": "val_rollouts/accuracy",
            "value": float(seed + step),
        }
        for seed in (3, 4)
        for arm in ("jepo", "rloo")
        for step in (0, 1)
    ]


def test_what_is_finished_is_not_run_again_and_stays_in_the_table(tmp_path, trained, capsys):
    arguments = [small_file(tmp_path), f"exp_manager.exp_dir={tmp_path}"]
    assert main([*arguments, "--seeds", "4", "--arms", "rloo"]) == 0
    assert trained == ["rloo, seed 4"]
    assert {(row["arm"], row["seed"]) for row in table(tmp_path)} == {("rloo", 4)}
    assert main(arguments) == 0
    assert trained == ["rloo, seed 4", *ALL[:3]]
    assert len(table(tmp_path)) == 8
    shown = capsys.readouterr().err
    assert "[1/4] jepo, seed 3  (about 0 min left)" in shown and "[4/4]" not in shown


def test_a_seed_of_ones_own_joins_the_table(tmp_path, trained):
    assert main([small_file(tmp_path), f"exp_manager.exp_dir={tmp_path}", "--seeds", "9"]) == 0
    assert {row["seed"] for row in table(tmp_path)} == {9}


def test_a_value_that_is_not_finite_is_null(tmp_path):
    (run, *_) = plan_runs("small", load_experiment(small_file(tmp_path)), [f"exp_manager.exp_dir={tmp_path}"])
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text('{"step": 1, "train_optim/surrogate_loss": null}\n')
    (run.folder / "finished.json").write_text('{"seconds": 1.0}')
    assert write_results(tmp_path / "small" / "results.parquet", "small", "verifiable", [run]) == 1
    assert table(tmp_path)[0]["value"] is None


def test_a_table_that_could_not_be_written_leaves_the_old_one(tmp_path, trained, monkeypatch):
    assert main([small_file(tmp_path), f"exp_manager.exp_dir={tmp_path}"]) == 0
    before = table(tmp_path)

    def break_off(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", break_off)
    with pytest.raises(OSError, match="disk full"):
        main([small_file(tmp_path), f"exp_manager.exp_dir={tmp_path}"])
    assert table(tmp_path) == before


@pytest.mark.parametrize("code", [75, 1, 2])
def test_a_run_that_does_not_end_well_ends_the_set(code, tmp_path, trained, monkeypatch, capsys):
    arguments = [small_file(tmp_path), f"exp_manager.exp_dir={tmp_path}"]
    good = experiments._train

    def train(run: experiments.Run) -> int:
        run.log.write_text("Traceback\nthe reason\n")
        return code if str(run) == ALL[1] else good(run)

    monkeypatch.setattr(experiments, "_train", train)
    assert main(arguments) == code
    assert trained == ALL[:1]
    assert ("the reason" in capsys.readouterr().err) == (code != 75)
    assert not (tmp_path / "small" / "results.parquet").exists()
    monkeypatch.setattr(experiments, "_train", good)
    assert main(arguments) == 0
    assert trained == ALL


def test_a_folder_begun_with_other_settings_is_refused(tmp_path, trained):
    arguments = [small_file(tmp_path), f"exp_manager.exp_dir={tmp_path}"]
    assert main(arguments) == 0
    with pytest.raises(ConfigError, match=r"was started with other settings \(model.optim.lr\)"):
        main([*arguments, "model.optim.lr=1"])
    assert trained == ALL


TWIN = """
config: jepo_tiny
regime: verifiable
seeds: [4]
overrides: [trainer.jepo.max_steps=2]
arms:
  rloo_too: [objective=rloo]
  jepo_2: [trainer.jepo.num_generations_per_prompt=2]
"""


def test_what_another_set_has_run_with_the_same_settings_is_not_run_again(tmp_path, trained, capsys):
    where = f"exp_manager.exp_dir={tmp_path / 'runs'}"
    assert main([small_file(tmp_path), where]) == 0
    trained.clear()
    (tmp_path / "twin.yaml").write_text(TWIN)
    assert main([str(tmp_path / "twin.yaml"), where]) == 0
    assert trained == ["jepo_2, seed 4"]
    link = tmp_path / "runs" / "twin" / "rloo_too" / "seed_4"
    assert os.readlink(link) == "../../small/rloo/seed_4", "the folder of all runs can be moved"
    assert "rloo_too, seed 4: the settings are those of" in capsys.readouterr().err
    found = pyarrow.parquet.read_table(tmp_path / "runs" / "twin" / "results.parquet").to_pylist()
    assert {row["arm"] for row in found} == {"rloo_too", "jepo_2"}

    shutil.rmtree(tmp_path / "runs" / "small")
    assert main([str(tmp_path / "twin.yaml"), where]) == 0
    assert trained == ["jepo_2, seed 4", "rloo_too, seed 4"], "a link that leads nowhere is run"
    assert not link.is_symlink()


def test_an_unfinished_twin_is_no_twin(tmp_path, trained):
    where = f"exp_manager.exp_dir={tmp_path / 'runs'}"
    assert main([small_file(tmp_path), where]) == 0
    (tmp_path / "runs" / "small" / "rloo" / "seed_4" / "finished.json").unlink()
    trained.clear()
    (tmp_path / "twin.yaml").write_text(TWIN)
    assert main([str(tmp_path / "twin.yaml"), where, "--arms", "rloo_too"]) == 0
    assert trained == ["rloo_too, seed 4"]


def test_time_left_counts_every_unfinished_run_as_long_as_its_own_arm_took(tmp_path):
    runs = plan_runs("small", load_experiment(small_file(tmp_path)), [f"exp_manager.exp_dir={tmp_path}"])
    assert experiments._time_left(runs) == ""
    for run, seconds in zip(runs[:2], (600, 60), strict=True):
        run.folder.mkdir(parents=True)
        (run.folder / "finished.json").write_text(json.dumps({"seconds": seconds}))
    assert experiments._time_left(runs) == "  (about 11 min left)"
    assert experiments._time_left(runs[:3]) == "  (about 10 min left)"
