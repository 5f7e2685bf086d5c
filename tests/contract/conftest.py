import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `compatibility` and `release_schemas` are modules of this folder's tests only
