"""Options of vLLM's server that users may not give it: they would go round what `nemo-jepo serve` sees to.

vLLM 0.32 takes an option as --name, --na_me, --name=value, --name.key, by any beginning that no other option shares,
from a YAML file, and some by a short name. All of those are refused; tests hold this against vLLM's own parser.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from nemo_jepo.config.errors import ConfigError

_ADDRESS = "the server must listen where `nemo-jepo serve` has checked it, and be one process group on this node"
_KEY = "everything that the server answers is behind the key"
_CODE = "the server must run no code and read no options that come from elsewhere"
_MODEL = "the server must serve the model of the folder, from its safetensors"
_ROLLOUTS = "`nemo-jepo serve` sets it as rollouts and weight pushes need it"
REFUSED: Mapping[str, Sequence[str]] = {
    _ADDRESS: (
        *("host", "port", "uds", "grpc", "grpc-port", "root-path", "headless", "api-server-count"),
        *("ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-cert-reqs", "ssl-ciphers", "enable-ssl-refresh"),
        *("master-addr", "master-port", "nnodes", "node-rank", "distributed-executor-backend", "enable-elastic-ep"),
        *("data-parallel-address", "data-parallel-rpc-port", "data-parallel-supervisor-port", "data-parallel-backend"),
        *("data-parallel-rank", "data-parallel-start-rank", "data-parallel-hybrid-lb", "data-parallel-external-lb"),
        *("data-parallel-multi-port-external-lb", "enable-fault-tolerance"),
        *("kv-transfer-config", "kv-events-config", "ec-transfer-config"),
    ),
    _KEY: (
        *("api-key", "middleware", "allow-credentials", "allowed-origins", "allowed-methods", "allowed-headers"),
        *("allowed-local-media-path", "allowed-media-domains"),
    ),
    _CODE: (
        *("config", "trust-remote-code", "code-revision", "tool-parser-plugin", "reasoning-parser-plugin"),
        *("io-processor-plugin", "logits-processors", "worker-cls", "worker-extension-cls", "scheduler-cls"),
        *("logging-config", "log-config-file", "tool-server", "enable-prompt-embeds", "enable-mm-embeds"),
        *("trust-request-chat-template", "trust-request-mm-kwargs", "structured-outputs-config", "ec-manager-config"),
    ),
    _MODEL: (
        *("model", "tokenizer", "tokenizer-mode", "hf-config-path", "hf-overrides", "hf-token", "config-format"),
        *("model-class-overrides", "load-format", "model-loader-extra-config"),
    ),
    _ROLLOUTS: (
        *("dtype", "tensor-parallel-size", "generation-config", "override-generation-config", "logprobs-mode"),
        *("weight-transfer-config", "no-enable-scale-out"),
    ),
}
"""Rule -> the long names that break it, without their dashes."""
WHOLE = ("reasoning-parser",)
"""Options of vLLM's that are the beginning of a refused one."""


def check_options(options: Iterable[str]) -> None:
    """Raise ConfigError for the first word of a command line for vLLM that is, or may be read as, a refused option."""
    for word in options:
        if not word.startswith("-") or re.fullmatch(r"-(\d.*)?", word):
            continue  # a value
        if word == "--" or not word.startswith("--"):
            raise ConfigError("--", word, "vLLM's options are taken by their long names alone", "Give the long name")
        if rule := _broken_by(word[2:]):
            raise ConfigError("--", word, rule, "Leave it out")


def check_engine_args(engine_args: Mapping[str, object]) -> None:
    """Raise ConfigError unless rollout.vllm.engine_args may go to vLLM."""
    for name, value in engine_args.items():
        key, words = f"rollout.vllm.engine_args.{name}", vllm_option(name, value)
        if name.startswith("-") or (rule := _broken_by(words[0][2:])):
            rule = "a name has no dashes before it" if name.startswith("-") else rule
            raise ConfigError(key, value, rule, "Leave it out")
        try:
            check_options(words[1:])
        except ConfigError as error:
            raise ConfigError(key, value, "vLLM would read the value as an option", "Leave it out") from error


def vllm_option(name: str, value: object) -> list[str]:
    """One engine_args entry as vLLM's command line has it; true is a flag, false its negation."""
    option = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [option if value else f"--no-{option[2:]}"]
    if isinstance(value, list):
        return [option, *map(str, value)]
    return [option, json.dumps(value) if isinstance(value, Mapping) else str(value)]


def _broken_by(word: str) -> str:
    """The rule that an option breaks, given without its dashes; empty where it breaks none."""
    name = re.split("[=.]", word, maxsplit=1)[0].replace("_", "-")
    for rule, names in REFUSED.items():
        if name not in WHOLE and any(refused.startswith(name) for refused in names):
            return rule
    return ""
