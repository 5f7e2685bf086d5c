import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # `memory` and `scenarios` are modules of this folder's tests only

_ANYTHING = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.filter_too_much)
settings.register_profile("quick", max_examples=700, deadline=None, suppress_health_check=_ANYTHING)
settings.register_profile("thorough", max_examples=20_000, deadline=None, suppress_health_check=_ANYTHING)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
