import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `core` is a module of this folder's tests only
