"""The benchmark of adaptation: its network is the one that the weights are for, and its page says what was measured."""

import pytest
import torch
from conftest import script
from safetensors.torch import load_file

from bn_affine_adapters import BNOnlyConfig, adapt_to, get_bn_only_model


def test_the_page_is_that_of_the_result_lines():
    bench = script("benchmarks/adaptation")
    lines = bench.read()
    assert len({(line["kind"], line["strength"], line["draw"]) for line in lines}) == len(lines) > 9
    assert bench.page(lines) in bench.PAGE.read_text()
    assert all("said" in line and line["restored"] == line["before"] for line in lines if line["kind"] == "collapse")


def test_a_corruption_is_stronger_the_larger_its_strength():
    bench = script("benchmarks/adaptation")
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for kind, strengths in bench.STRENGTHS.items():
        changes = [(bench.corrupted(images, kind, each, 0) - images).abs().mean().item() for each in strengths]
        assert changes == sorted(changes)
        assert changes[0] > 0.01
        again = bench.corrupted(images, kind, strengths[0], 0)
        assert torch.equal(again, bench.corrupted(images, kind, strengths[0], 0))
        assert 0 <= again.min() <= again.max() <= 1


def test_an_adapter_of_its_network_is_adapted(bnaa_data):
    bench = script("benchmarks/adaptation")
    network = bench.ResNet20()
    network.load_state_dict(load_file(bnaa_data / "weights" / "cifar_resnet20_option_a" / "model.safetensors"))
    assert sum(parameter.numel() for parameter in network.parameters()) == 269_722
    model = get_bn_only_model(network.eval(), BNOnlyConfig())
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = model(images)
    adaptation = adapt_to(model, [images])
    assert not torch.equal(model(images), before)
    adaptation.reset()
    assert torch.equal(model(images), before)


def test_a_mean_and_its_interval_are_those_of_student():
    bench = script("benchmarks/adaptation")
    mean, half = bench.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    assert half == pytest.approx(2.776 * (2.5 / 5) ** 0.5)
