"""predict prepares an image as the network was trained on, and answers with names."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import resolve_data_config

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model, predict
from bn_affine_adapters.errors import ConfigError, DataError
from bn_affine_adapters.model.images import completed, image_files
from bn_affine_adapters.model.prediction import predict_each
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


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(load_sample_images().images[0][200:260, 250:330])


def test_arrays_and_tensors_are_the_image_that_they_hold(photo):
    model = small()
    pixels = np.asarray(photo)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    expected = predict(model, photo)
    for same in (pixels, tensor, tensor / 255, (tensor / 255).double(), pixels[:, ::-1][:, ::-1]):
        assert predict(model, same) == expected
    grey = np.asarray(photo.convert("L"))
    expected = predict(model, photo.convert("L"))
    for same in (grey, grey[:, :, None], torch.from_numpy(grey.copy())[None], grey.astype(np.uint16) * 257):
        assert predict(model, same) == expected
    alpha = np.asarray(photo.convert("RGBA"))
    assert predict(model, alpha) == predict(model, photo)


def test_several_images_are_classified_together(photo, tmp_path):
    model = small(label_names=["a", "b", "c"])
    photo.save(tmp_path / "a.png")
    others = [photo.rotate(angle) for angle in range(0, 360, 5)]  # more than the network gets at once
    found = predict(model, [tmp_path / "a.png", *others], top_k=2)
    assert len(found) == 73
    assert found[0] == found[1]
    for image, best in zip(others[:8], found[1:], strict=False):
        alone = predict(model, image, top_k=2)
        assert [b.label for b in best] == [b.label for b in alone]
        assert [b.probability for b in best] == pytest.approx([b.probability for b in alone], abs=1e-5)
    same = np.stack([np.asarray(image) for image in others[:3]])
    as_tensor = torch.from_numpy(same).permute(0, 3, 1, 2)
    for several in (same, as_tensor, as_tensor / 255, others[:3], tuple(others[:3]), iter(others[:3])):
        assert predict(model, several) == predict(model, others[:3])
    assert predict(model, []) == []


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (torch.full((3, 9, 9), 1.5), "1.5"),
        (torch.full((3, 9, 9), float("nan")), "nan"),
        (torch.zeros(9, 9, 3), "(C, H, W)"),
        (torch.zeros(3, 9, 9, dtype=torch.int64), "int64"),
        (np.zeros((9, 9, 3)), "f8"),
        (np.zeros((3, 9, 9), np.uint8), "(1, 1, 9)"),
        (np.zeros((9, 9), np.float32), "mode F"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_image_is_refused(refused, wrong, word):
    with refused(DataError, word, "(H, W, C)"):
        predict(small(), wrong)


def test_each_image_comes_with_its_classes_or_its_error(photo, tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for name in ("folder/b.png", "folder/inner/a.JPG", "first.png"):
        photo.save(tmp_path / name)
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    (tmp_path / "folder" / "c.png").write_bytes(b"no image")
    files = list(image_files([tmp_path / "first.png", tmp_path / "folder", tmp_path / "nowhere.png"]))
    names = ["first.png", "b.png", "c.png", "a.JPG", "nowhere.png"]
    assert [Path(file).name for file in files] == names
    found = dict(predict_each(small(), files, top_k=1))
    assert list(found) == files
    assert [isinstance(found[file], DataError) for file in files] == [False, False, True, False, True]
    for file in (files[2], files[4]):
        assert file in found[file].what


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_pct": 2.5}, {"mean": [0.5]}, {"std": [1, 1, 0]},
        {"input_size": [2, 32, 32]}, {"input_size": [3, 32]}, {"input_size": [3, 32, 0]}, {"input_size": None},
    ],
)  # fmt: skip
def test_a_data_configuration_that_timm_would_misread_is_refused(refused, wrong):
    model = small(data_config={"input_size": [3, 32, 32], **wrong})
    with refused(ConfigError, str(next(iter(wrong.values()))), "data_config="):
        predict(model, Image.new("RGB", (60, 60)))


def test_the_data_configuration_of_every_pretrained_network_of_timm_is_usable():
    names = timm.list_models(pretrained=True)
    for name in names:
        about = timm.models.get_pretrained_cfg(name).to_dict()
        data = {k: list(v) if isinstance(v, tuple) else v for k, v in resolve_data_config(pretrained_cfg=about).items()}
        assert completed(data)["input_size"] == data["input_size"], name
    assert len(names) > 1500


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
