"""Write the golden compact files of a new version of their format, from the newest golden adapter.

    python tests/golden/make_compact.py

Files of an older version are never written again: that is what they are kept for.
"""

import json
from hashlib import sha256
from pathlib import Path

import torch

from bn_affine_adapters import export, load_bn_only_model
from bn_affine_adapters.adapter.fold import copies, parameters
from bn_affine_adapters.settings import FORMAT_VERSION
from bn_affine_adapters.sharing.compact import VERSION

if __name__ == "__main__":
    here, found = Path(__file__).parent, {}
    for bits in (8, 4):
        model = load_bn_only_model(here / f"adapter-v{FORMAT_VERSION}")
        file = export(model, here / f"compact-v{VERSION}-{bits}bits.safetensors", format="compact", bits=bits)
        loaded = load_bn_only_model(file)
        held = parameters(copies(loaded.get_base_model(), "default", loaded.peft_config["default"]))
        values = torch.cat([tensor.flatten() for tensor in held.values()])
        with torch.no_grad():
            logits = loaded(torch.linspace(-2, 2, 3 * 16 * 16).view(1, 3, 16, 16))[0].tolist()
        found[bits] = {"values": sha256(values.numpy().astype("<f4").tobytes()).hexdigest(), "logits": logits}
    (here / f"compact-v{VERSION}.json").write_text(json.dumps(found, indent=2) + "\n")
