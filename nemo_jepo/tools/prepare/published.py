"""Every data set that can be prepared, by name."""

from nemo_jepo.tools.prepare.benchmarks import BENCHMARKS
from nemo_jepo.tools.prepare.training_sets import TRAINING_SETS

PUBLISHED = TRAINING_SETS | BENCHMARKS
