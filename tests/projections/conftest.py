import importlib.util
import sys
from pathlib import Path

# Tests are imported without their folder on the path: what several of them share is made known here.
_PATH = Path(__file__).with_name("histories.py")
_SPEC = importlib.util.spec_from_file_location("projection_histories", _PATH)
assert _SPEC
assert _SPEC.loader
_MODULE = importlib.util.module_from_spec(_SPEC)
sys.modules["projection_histories"] = _MODULE
_SPEC.loader.exec_module(_MODULE)
