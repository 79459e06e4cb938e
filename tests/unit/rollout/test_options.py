"""What may not go to vLLM behind `--` or in rollout.vllm.engine_args."""

import pytest

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.rollout.vllm.options import REFUSED, check_engine_args, check_options, vllm_option

ALLOWED = ["--max-num-seqs", "-1", "--gpu-memory-utilization=0.8", "--chat-template", "FILE", "--enable-sleep-mode"]
ALLOWED += ["--max-model-len", "4096", "--data-parallel-size", "2", "--compilation-config.mode", "3", "--enforce-eager"]


@pytest.mark.parametrize(
    "spelling",
    [
        *("--host", "--host=0.0.0.0", "--hos", "--ho=x", "--port", "--uds", "--api-key", "--api_key", "--api_k=x"),
        *("--middleware", "--root-path", "--root_path", "--ssl-keyfile", "--ssl-k", "--config", "--config=f.yaml"),
        *("--trust-remote-code", "--trust_remote_code", "--tool_parser-plugin", "--hf-overrides", "--hf-overrides.a.b"),
        *("--weight-transfer-config.backend", "--worker_extension_cls", "--load-format", "--no-enable-scale-out"),
        *("-tp", "-asc=2", "-n", "-", "--", "--logging-config", "--kv_transfer_config.kv_connector_module_path"),
    ],
)
def test_what_goes_round_a_rule_is_refused_in_every_spelling(spelling):
    if spelling == "-":  # a value
        return check_options([spelling])
    with pytest.raises(ConfigError, match=f"^--='{spelling}': ") as refused:
        check_options(["--max-num-seqs", "4", spelling, "0.0.0.0"])
    assert "\n" not in str(refused.value)


def test_other_options_and_values_go_through():
    check_options(ALLOWED)


def test_engine_args_obey_the_same_rules_and_name_their_key():
    check_engine_args({"gpu_memory_utilization": 0.8, "enable_sleep_mode": True, "seed": -1})
    for name, value in {
        "host": "0.0.0.0",
        "trust_remote_code": True,
        "enable_scale_out": False,
        "api-key": "k",
    }.items():
        with pytest.raises(ConfigError, match=f"^rollout.vllm.engine_args.{name}={value!r}: "):
            check_engine_args({name: value})
    for name, value in {"chat_template": "--host=0.0.0.0", "--host": "x", "max_num_seqs": ["1", "--uds=x"]}.items():
        with pytest.raises(ConfigError, match=f"^rollout.vllm.engine_args.{name}="):
            check_engine_args({name: value})


def test_engine_args_stand_on_the_command_line_as_vllm_reads_them():
    assert vllm_option("enforce_eager", False) == ["--no-enforce-eager"]
    assert vllm_option("speculative_config", {"method": "ngram"}) == ["--speculative-config", '{"method": "ngram"}']
    assert vllm_option("cudagraph_capture_sizes", [1, 2]) == ["--cudagraph-capture-sizes", "1", "2"]


def test_no_name_is_refused_twice():
    names = [name for names in REFUSED.values() for name in names]
    assert len(names) == len(set(names))
