"""python -m tests.fuzz [--inputs 10000] [--seed 0] [--only NAME ...] [--failed FOLDER]

Exit code 0 where every input was accepted or refused in one line, 1 where one was not.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> int:
    """Run the campaigns, print their table and what failed."""
    from tests.fuzz.campaigns import CAMPAIGNS
    from tests.fuzz.runner import quiet_libraries, run_all, table

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="of all campaigns together")
    parser.add_argument("--seed", type=int, default=0, help="the same one makes the same inputs")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=CAMPAIGNS, help=", ".join(CAMPAIGNS))
    parser.add_argument("--failed", type=Path, help="folder that gets inputs that fail; default: a new one")
    options = parser.parse_args()
    failed = options.failed or Path(tempfile.mkdtemp(prefix="nemo_jepo_fuzz_"))
    chosen = {name: it for name, it in CAMPAIGNS.items() if options.only is None or name in options.only}
    with quiet_libraries():
        results = run_all(chosen, options.inputs, options.seed, failed)
    for result in results.values():
        for failure in result.failures[:5]:
            print(f"\n{failure}")
    kinds = [kind for result in results.values() for kind in sorted(result.kinds)]
    print("\n".join(["", *kinds, "", table(results)]))
    if kinds:
        print(f"inputs that failed are in {failed}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
