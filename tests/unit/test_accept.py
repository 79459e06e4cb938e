"""The acceptance on one GPU, dry: what passes, what cannot run and what takes too long are told apart and written."""

import json

from tests.gpu import accept, accept_four
from tests.gpu.accept import Check


def test_a_check_that_takes_too_long_does_not_stop_the_others(tmp_path):
    checks = (Check("updates_local", 60), Check("parity", 1), Check("ceilings", 60, times=True))
    assert accept.main(["--dry-run", "--out", str(tmp_path)], checks) == 1
    outcomes = json.loads((tmp_path / "acceptance.json").read_text())
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        "updates_local": "skipped",
        "parity": "failed",
        "ceilings": "passed",
    }
    assert outcomes["updates_local"]["reason"] == "needs a GPU"
    assert "took longer than" in outcomes["parity"]["reason"]
    assert outcomes["ceilings"]["found"]["matrix_product_tflops"] > 0
    page = (tmp_path / "acceptance.md").read_text()
    assert "| parity | failed |" in page and "matrix_product_tflops" in page


def test_the_checks_for_four_gpus_run_dry_on_two_processes(tmp_path):
    arguments = ["--dry-run", "--out", str(tmp_path), "--only", "layouts_fp32"]
    assert accept.main(arguments, accept_four.CHECKS, accept_four.__doc__) == 0
    outcomes = json.loads((tmp_path / "acceptance.json").read_text())
    assert outcomes["layouts_fp32"]["status"] == "passed"
    assert outcomes["layouts_fp32"]["found"]["qwen3: TP2"]["grad_norm"] < 1e-4
    assert (tmp_path / "acceptance.md").read_text().startswith("# Acceptance on four GPUs\n")
