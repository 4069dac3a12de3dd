"""Settings of the whole suite: tests import minipic from this checkout, and no peer asks the network for a file."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
