"""Where things are. Needs nothing but Python, as the driver and the pack do."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACK = ROOT / ".gpu"  # what is brought to a GPU machine


def python_path() -> str:
    """For processes of our own: the repository, its tests, and what is there already."""
    return os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
