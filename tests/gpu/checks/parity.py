"""The same numbers as transformers, and the pytest files of this folder."""

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import Tensor

from tests.gpu.checks.common import GPU, ROOT, Report, Sizes, Skip, relative_error
from tests.support.layer_kinds import attention_chosen_anew


def parity(report: Report, size: Sizes) -> None:
    """The actor's log-probs, entropies, loss and gradients against transformers' on the CPU, every family."""
    from nemo_jepo.actor import parallel

    parallel.init_distributed()
    from tests.distributed import scoring_jobs, test_against_transformers
    from tests.support.hf_models import random_model, save

    by_transformers = test_against_transformers.by_transformers
    weights = test_against_transformers.token_weights()
    with tempfile.TemporaryDirectory() as folder:
        for family in size.families:
            model = random_model(f"{family} untied")
            job = {"folder": save(model, Path(folder) / family), "model": {}, "precision": "fp32"}
            given = [weights[str(number)] for number in range(len(weights))]
            expected = by_transformers(model, weights)
            rounded = by_transformers(random_model(f"{family} untied").bfloat16(), weights)
            with attention_chosen_anew():
                found = scoring_jobs.scores_and_gradients(job | {"token_weights": given})
            in_bf16 = scoring_jobs.scores_and_gradients(job | {"precision": "bf16", "token_weights": None})
            names = [name for name in expected if name.startswith("logprob/")]
            gradients = [name for name in expected if name.startswith("grad/")]
            difference = {
                "fp32 log-probs, largest, nats": max(
                    (found[name] - expected[name]).abs().max().item() for name in names if expected[name].numel()
                ),
                "fp32 loss, relative": abs(float(found["loss"] / expected["loss"]) - 1),
                "fp32 gradients, largest relative": max(relative_error(found[n], expected[n]) for n in gradients),
            }
            errors = {
                "bf16 log-probs, RMS, nats": root_mean_square(in_bf16, expected, names),
                "transformers' own in bf16": root_mean_square(rounded, expected, names),
            }
            report[family] = difference | errors
            own, usual = errors.values()
            report.expect(difference["fp32 log-probs, largest, nats"] < 1e-4, f"{family}: fp32 log-probs agree")
            report.expect(difference["fp32 gradients, largest relative"] < 1e-3, f"{family}: fp32 gradients agree")
            report.expect(0 < own < 1.5 * usual, f"{family}: bf16 rounds at most 1.5 times as much as transformers")


def root_mean_square(found: dict[str, Tensor], exact: dict[str, Tensor], names: Sequence[str]) -> float:
    """Of all differences together."""
    return torch.cat([found[name] - exact[name] for name in names]).square().mean().sqrt().item()


def suite(report: Report, size: Sizes, files: Sequence[str], expression: str = "") -> None:
    """Tests of this folder, by pytest."""
    if not GPU:
        raise Skip("these tests need a GPU")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={folder}/tests.xml"]
        command += [f"tests/gpu/{name}" for name in files] + (["-k", expression] if expression else [])
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not Path(folder, "tests.xml").exists():
            raise RuntimeError(ended.stdout[-2000:] + ended.stderr[-2000:])
        cases = list(ElementTree.parse(f"{folder}/tests.xml").iter("testcase"))
    outcome: Counter[str] = Counter()
    for case in cases:
        bad = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        outcome[bad[0] if bad else "passed"] += 1
        if bad and bad[0] != "skipped":
            element = case.find(bad[0])
            lines = (element.text or "").strip().splitlines() if element is not None else []
            report.faults.append(f"{case.get('name')}: {' | '.join(lines[-6:])[:600]}")
    report["tests"] = dict(outcome)
    if outcome["skipped"] and len(outcome) == 1:
        raise Skip("every test was skipped")
