import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `memory` and `scenarios` are modules of this folder's tests only
