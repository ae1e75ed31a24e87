"""The benchmark of mixed batches: its sides compute the same, and its page says what was measured."""

import torch
from conftest import script

from bn_affine_adapters.adapter.layer import adapter_layers


def test_every_side_gives_each_image_the_logits_of_its_adapter():
    bench = script("benchmarks/mixed")
    model, images = bench.many("test_resnet", 16, 32), torch.randn(32, 3, 32, 32)
    sides = bench.sides(model, images, [1, 16])
    assert list(sides) == ["merged", "folded", "mixed 1", "mixed 16", "loop 16", "parts 16"]
    with torch.no_grad():
        found = {name: run() for name, run in sides.items()}
    assert torch.allclose(found["merged"], found["mixed 1"], atol=1e-5)
    assert torch.allclose(found["merged"], found["folded"], atol=1e-4)
    assert torch.allclose(found["mixed 16"], found["parts 16"], atol=1e-5)
    assert not torch.allclose(found["mixed 16"], found["merged"], atol=1e-3)
    assert torch.allclose(found["mixed 16"][::16], found["merged"][::16], atol=1e-5)
    assert torch.allclose(found["loop 16"][0], found["merged"][::16], atol=1e-5)
    assert any(layer.scale_shift is not None for layer in adapter_layers(model))


def test_the_page_has_a_row_for_each_network():
    bench = script("benchmarks/mixed")
    measured = bench.measured("test_resnet", [1, 16], 16, 32, 1)
    without = {side: ratio for side, ratio in measured["over_merged"].items() if side != "folded"}
    networks = [measured, {**measured, "network": "test_vit", "over_merged": without}]
    options = {"models": ["test_resnet", "test_vit"], "adapters": [1, 16], "batch": 16, "size": 32, "rounds": 1}
    memory = {"adapters": 2, "resident_MB": 3.0, "tensors_MB": 2.5, "ratio": 1.2}
    page = bench.page({"options": {**options, "held": 2}, "networks": networks, "switch_ms": 0.5, "memory": memory})
    rows = [line for line in page.splitlines() if line.startswith("| test_")]
    assert [row.split(" | ")[2] == "-" for row in rows] == [False, True]  # without BatchNorm nothing is folded
    assert all(row.count("|") == 8 for row in rows)
    assert "--models test_resnet test_vit --adapters 1 16 --batch 16" in page
