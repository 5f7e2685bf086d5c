import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # `ports` is a module of the tests of all folders

# How long an example takes says what else the machine is doing; time is measured in `tests/bench`, by ratios.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
