"""A judge's settings: rules between them, its key and its prompt, before a model is built."""

import pytest

from nemo_jepo.config import compose
from nemo_jepo.config.check import check
from nemo_jepo.config.errors import ConfigError

NODES = ["evaluation.judge", "evaluation.model_verifier"]
URL = "http://127.0.0.1:9/v1"


def config(*overrides: str):
    checked = compose.resolve(compose.compose("demo", list(overrides)))
    check(checked, 1)
    return checked


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("override", ["correct=' '", "wrong='Verdict {code}: CORRECT'", "wrong='{answer}: no'"])
def test_verdict_lines_must_be_told_apart(override):
    node = "evaluation.judge"
    words = [f"{node}.correct='Verdict {{code}}: correct'", f"{node}.{override}"]
    assert error_of(*words).startswith(f"{node}.correct, {node}.wrong=")


def test_equal_votes_are_refused():
    assert error_of("evaluation.judge.temperature=0").startswith("evaluation.judge.temperature=0: 5 votes would be one")
    config("evaluation.judge.temperature=0", "evaluation.judge.votes=1")


@pytest.mark.parametrize("node", NODES)
def test_rules_between_a_judge_and_the_run(node, tmp_path):
    assert error_of(f"{node}.url={URL}", "evaluation.verify=false").startswith(f"{node}.url='{URL}': is asked where")
    assert error_of(f"{node}.url=rollout").startswith(f"{node}.url='rollout': are the vLLM servers of the run")
    config(f"{node}.url=rollout", "rollout=vllm")
    asleep = error_of(f"{node}.url=rollout", "rollout=vllm_colocated")
    assert asleep.startswith(f"{node}.url='rollout': are the vLLM servers of the run, which sleep when")


def test_a_model_verifier_rewards_only_where_it_is_asked_for(tmp_path):
    node, rloo = "hybrid.verifier", ["objective=rloo", "rollout.stop_at_marker=false"]
    hybrid = [*rloo, "objective.reward=hybrid"]
    config(*hybrid, f"{node}.url={URL}")
    for name in ("jepo", "sft", "gm"):
        line = error_of(f"objective={name}", "objective.reward=hybrid", f"{node}.url={URL}")
        assert line.startswith(f"objective.reward='hybrid': objective={name} does not read the reward of own answers; ")
        assert "rloo, jepo_rl, dpo do" in line
    assert error_of(*hybrid).startswith(f"{node}.url=None: objective.reward=hybrid asks a model")
    assert error_of(*rloo, f"{node}.url={URL}").startswith(
        f"{node}.url='{URL}': nobody asks it with objective.reward=rule"
    )
    assert error_of(*hybrid, f"{node}.url=rollout").startswith(f"{node}.url='rollout': are the vLLM servers of the run")
    assert error_of(*hybrid, f"{node}.url={URL}", f"{node}.votes=5").startswith(f"{node}.temperature=0: 5 votes would")
    missing = f"{node}.api_key_file={tmp_path / 'none'}"
    assert error_of(*hybrid, f"{node}.url={URL}", missing).startswith(f"{node}.api_key_file=")


def test_a_judge_scores_own_answers_only_where_pairs_are_compared_by_scores(tmp_path):
    node, dpo = "dpo.judge", ["objective=dpo", "dpo.unverifiable=score"]
    config(*dpo, f"{node}.url={URL}")
    assert error_of(*dpo) == (
        f"{node}.url=None: dpo.unverifiable=score asks a judge. Give its address, http://HOST:PORT/v1."
    )
    assert error_of("objective=dpo", f"{node}.url={URL}").startswith(
        f"{node}.url='{URL}': nobody asks it with dpo.unverifiable=likelihood"
    )
    for name in ("jepo", "rloo"):
        line = error_of(f"objective={name}", "dpo.unverifiable=score", f"{node}.url={URL}")
        assert line.startswith(f"dpo.unverifiable='score': objective={name} compares no pairs")
    scored = [*dpo, f"{node}.url={URL}"]
    (tmp_path / "pairs.jsonl").touch()
    judgements = ["data=jsonl", f"data.train_path={tmp_path / 'pairs.jsonl'}", "data.group_key=group"]
    judgement = error_of(*scored, *judgements, "data.verifier=judgement")
    assert judgement.startswith("dpo.unverifiable='score': asks a judge about answers")
    assert error_of(*scored, "self_verification.weight=0.1").startswith("dpo.unverifiable='score': tells better")
    assert error_of(*dpo, f"{node}.url=rollout").startswith(f"{node}.url='rollout': are the vLLM servers of the run")
    assert error_of(*scored, f"{node}.api_key_file={tmp_path / 'none'}").startswith(f"{node}.api_key_file=")
    assert error_of(*scored, f"{node}.prompt=Score it.").startswith(f"{node}.prompt='Score it.': must be a text that")


@pytest.mark.parametrize("line", ["7", "{score} {score}", "{score}: {answer}", "{score}\n."])
def test_a_score_line_holds_one_score(line):
    found = error_of(
        "objective=dpo", "dpo.unverifiable=score", f"dpo.judge.url={URL}", f"dpo.judge.score_line='{line}'"
    )
    assert found.startswith("dpo.judge.score_line=") and "must be one line with {score} in it once" in found


def test_a_key_file_is_read_before_the_run_begins(tmp_path):
    file = tmp_path / "key"
    overrides = [f"evaluation.judge.url={URL}", f"evaluation.judge.api_key_file={file}"]
    assert error_of(*overrides) == (f"evaluation.judge.api_key_file='{file}': no such file. Write the key into it.")
    file.write_text("secret\n")
    file.chmod(0o644)
    assert error_of(*overrides).endswith(f"others may read it. Run: chmod 600 {file}.")
    file.chmod(0o600)
    assert config(*overrides).evaluation.judge.key("evaluation.judge") == "secret"
    for text in (" \n", "two words", "two\nlines", "schl\u00fcssel"):
        file.write_text(text)
        assert error_of(*overrides).startswith("evaluation.judge.api_key_file=")


def test_any_server_any_model_and_further_fields_may_be_given():
    url = "https://judges.example.org/some/where/v1/"
    found = config(f"evaluation.judge.url={url}", "+evaluation.judge.extra_body={top_p: 0.9, seed: null}")
    assert found.evaluation.judge.url == url
    assert found.evaluation.judge.extra_body == {"top_p": 0.9, "seed": None}


def test_a_judges_prompt_comes_from_a_conf_file_and_is_saved_with_the_run(tmp_path):
    text = "Compare {answer}\nwith {reference_answer}:\n{correct}\n{wrong}\n"
    (tmp_path / "mine.yaml").write_text(
        "defaults: [demo, _self_]\nevaluation:\n  judge:\n    prompt: |\n"
        + "".join(f"      {line}\n" for line in text.splitlines())
    )
    found = compose.resolve(compose.compose("mine", config_path=tmp_path))
    assert found.evaluation.judge.prompt == text
    (tmp_path / "config.yaml").write_text(compose.to_yaml(found))
    assert compose.resolve(compose.compose("config", config_path=tmp_path)) == found
