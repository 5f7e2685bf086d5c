import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the harness's modules are this folder's only, and run as scripts too
