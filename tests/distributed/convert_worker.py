"""Many imports and exports in one start of the processes. Run by test_convert.

python -m tests.distributed.convert_worker jobs.json     (once a rank; jobs: a list of command lines after `nemo-jepo`)
"""

import json
import sys
from pathlib import Path

from nemo_jepo import cli

if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        assert cli.main(job) == 0
