"""Makes a training run's model the one that the package takes where none is named.

python scripts/ship_model.py runs/support      (writes mann_fast/pretrained/omniglot.safetensors)
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from mann_fast.training.checkpoint import PRETRAINED, load_checkpoint, save_weights

MOST_BYTES = 3_000_000  # of the file: everybody who installs the package gets it

if __name__ == "__main__":
    content = load_checkpoint(Path(sys.argv[1]))
    # By its name, not by the place where it lay on the machine that trained.
    content["config"] = replace(content["config"], data="omniglot")
    save_weights(PRETRAINED, content)
    size = PRETRAINED.stat().st_size
    print(f"{PRETRAINED.name}: {size:,} bytes")
    sys.exit(size > MOST_BYTES)
