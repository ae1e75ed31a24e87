"""Write an adapter of the newest format: that of the format before, loaded and saved again.

    python tests/golden/make.py

An adapter of an older format is never written again: that is what it is kept for.
"""

import json
import shutil
from pathlib import Path

from bn_affine_adapters import load_bn_only_model
from bn_affine_adapters.settings import FORMAT_VERSION

if __name__ == "__main__":
    here = Path(__file__).parent
    target = here / f"adapter-v{FORMAT_VERSION}"
    load_bn_only_model(here / f"adapter-v{FORMAT_VERSION - 1}").save_pretrained(target)
    shutil.copy(here / f"adapter-v{FORMAT_VERSION - 1}.json", here / f"adapter-v{FORMAT_VERSION}.json")
    print(json.loads((target / "adapter_config.json").read_text())["format_version"])
