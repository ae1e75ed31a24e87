"""predict prepares an image as the network was trained on, and answers with names."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model, predict
from bn_affine_adapters.errors import ConfigError, DataError
from bn_affine_adapters.training.data import decode, eval_batches, load_splits

GOLDEN = Path(__file__).parents[1] / "golden" / "adapter-v1"


def small(**config):
    return get_bn_only_model(timm.create_model("test_resnet", num_classes=3), BNOnlyConfig(seed=0, **config)).eval()


def test_predict_agrees_with_the_recipes_evaluation_on_real_digits():
    model = load_bn_only_model(GOLDEN)
    config = model.peft_config["default"]
    _, test = load_splits("digits")
    tensors = decode(test, size=config.data_config["input_size"][-1])
    mean, std = config.data_config["mean"], config.data_config["std"]
    batch = next(iter(eval_batches(tensors, batch_size=64, mean=mean, std=std, rank=0, world=1)))
    with torch.no_grad():
        expected = model(batch.images).softmax(1)
    right = 0
    for row in range(64):
        best = predict(model, test.dataset[row]["image"], top_k=10)
        assert [config.label_names.index(b.label) for b in best[:1]] == expected[row].argsort(descending=True)[
            :1
        ].tolist()
        assert best[0].probability == pytest.approx(expected[row].max().item(), abs=1e-4)
        assert sum(b.probability for b in best) == pytest.approx(1, abs=1e-4)
        right += best[0].label == str(test.dataset[row]["label"])
    assert right >= 55


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "CMYK"])
def test_images_of_every_mode_and_shape_are_taken(mode):
    best = predict(small(label_names=["a", "b", "c"]), Image.new(mode, (37, 80)), top_k=2)
    assert len(best) == 2
    assert {b.label for b in best} < {"a", "b", "c"}


def test_a_file_and_the_image_in_it_give_the_same(tmp_path):
    Image.effect_noise((50, 40), 90).save(tmp_path / "noise.png")
    model = small()
    assert predict(model, tmp_path / "noise.png") == predict(model, Image.open(tmp_path / "noise.png"))


def test_a_network_of_one_channel_gets_grey_images():
    base = timm.create_model("test_resnet", in_chans=1, num_classes=3)
    assert len(predict(get_bn_only_model(base, BNOnlyConfig(seed=0)), Image.new("RGB", (60, 60)))) == 3


def test_without_names_a_class_is_its_number():
    assert {b.label for b in predict(small(), Image.new("RGB", (60, 60)))} == {"0", "1", "2"}


def test_the_active_adapters_names_are_used_and_the_mode_is_kept():
    model = small(label_names=["a", "b", "c"])
    model.add_adapter("other", BNOnlyConfig(seed=0, label_names=["x", "y", "z"]))
    model.set_adapter("other")
    model.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert {b.label for b in predict(model, Image.new("RGB", (60, 60)))} == {"x", "y", "z"}
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_network_in_bfloat16_predicts():
    assert len(predict(small().to(torch.bfloat16), Image.new("RGB", (60, 60)))) == 3


def test_a_broken_image_and_a_foolish_k_are_refused(tmp_path, refused):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 50)
    with refused(DataError, "PIL"):
        predict(small(), tmp_path / "broken.png")
    with refused(DataError, "nowhere.png"):
        predict(small(), tmp_path / "nowhere.png")
    with refused(ConfigError, "top_k=0"):
        predict(small(), Image.new("RGB", (60, 60)), top_k=0)
