"""A pretrained network adapted to real images: the adapter and its base come back together, or not at all."""

import datasets
import numpy as np
import peft
import pytest
import timm
import torch
from torch.nn import functional as F

from bn_affine_adapters import BNOnlyConfig, BNOnlyPeftModel, get_bn_only_model, load_bn_only_model

CLASSES, SIZE, BATCH = 43, 48, 32
NAME = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def pretrained(bnaa_data):
    """Create the ImageNet network from its file."""
    file = bnaa_data / "weights" / "tf_efficientnet_lite0.in1k" / "model.safetensors"

    def create(**arguments):
        torch.manual_seed(0)  # draws a head of other classes
        return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **arguments)

    return create


@pytest.fixture(scope="module")
def signs(bnaa_data, tmp_path_factory):
    """Real traffic signs: images in [-1, 1], float32 (n, 3, 48, 48), and labels; some to train on and some held out."""
    data = datasets.load_dataset(str(bnaa_data / "gtsrb-32-mini"), cache_dir=str(tmp_path_factory.mktemp("cache")))

    def tensors(split, count):
        rows = data[split].shuffle(seed=0).select(range(count))
        pixels = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in rows["image"]])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        return F.interpolate(images, (SIZE, SIZE), mode="bilinear"), torch.tensor(rows["label"])

    return {"train": tensors("train", 800), "test": tensors("test", 400)}


def train(model, images, labels, epochs, rate):
    """Adam, its rate falling linearly; return each step's loss."""
    torch.manual_seed(0)
    model.train()
    batches = torch.cat([torch.randperm(len(images)) for _ in range(epochs)]).split(BATCH)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    losses = []
    for step, rows in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / len(batches))
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def accuracy(model, images, labels):
    """In %."""
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


@pytest.fixture(scope="module")
def adapted(pretrained, signs, tmp_path_factory):
    """A norm + head adapter on real images: its folder, its logits on the test images, how training went."""
    model = get_bn_only_model(pretrained(num_classes=CLASSES), BNOnlyConfig(train_head=True))
    losses = train(model, *signs["train"], epochs=2, rate=0.02)
    folder = tmp_path_factory.mktemp("adapted")
    model.save_pretrained(folder)
    with torch.no_grad():
        logits = model(signs["test"][0][:64])
    return folder, logits, losses, accuracy(model, *signs["test"]), model.get_nb_trainable_parameters()


def test_norm_and_head_learn_traffic_signs(adapted):
    _, _, losses, found, counts = adapted
    print(f"{counts[0]:,} of {counts[1]:,} trained: {losses[0]:.2f} to {losses[-1]:.2f}, {found:.1f} %")
    assert counts[0] == 2 * 21_008 + (1_280 + 1) * CLASSES
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert found > 6 * 100 / CLASSES


def test_the_adapter_is_all_that_is_saved(adapted):
    folder = adapted[0]
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    print(sizes)
    assert sizes.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert sizes["adapter_model.safetensors"] < 600_000


@pytest.mark.parametrize("classes", [CLASSES, 1000, 7])
def test_reload_on_a_fresh_base_gives_identical_logits(classes, adapted, pretrained, signs):
    folder, logits, *_ = adapted
    again = load_bn_only_model(folder, pretrained(num_classes=classes))
    assert torch.equal(again(signs["test"][0][:64]), logits)


def test_peft_loads_it_too(adapted, pretrained, signs):
    folder, logits, *_ = adapted
    again = peft.PeftModel.from_pretrained(pretrained(), folder)
    assert type(again) is BNOnlyPeftModel
    assert torch.equal(again(signs["test"][0][:64]), logits)
    plain = again.merge_and_unload()
    assert plain.num_classes == CLASSES
    assert torch.equal(plain(signs["test"][0][:64]), logits)


# That another base is refused, and none asked for: tests/model/test_loading.py.


def test_what_the_adapter_brings_itself_may_differ_in_the_base(adapted, pretrained, signs):
    folder, logits, *_ = adapted
    base = pretrained(num_classes=CLASSES)
    base.bn1.running_mean += 1
    torch.nn.init.zeros_(base.classifier.weight)
    assert torch.equal(load_bn_only_model(folder, base)(signs["test"][0][:64]), logits)


def test_frozen_running_statistics_are_those_of_the_base(pretrained, signs, tmp_path):
    base = pretrained(num_classes=CLASSES)
    statistics = {key: tensor.clone() for key, tensor in base.state_dict().items() if "running" in key}
    model = get_bn_only_model(base, BNOnlyConfig(train_head=True, running_statistics="frozen"))
    losses = train(model, *(tensor[:320] for tensor in signs["train"]), epochs=2, rate=0.003)
    print(f"{losses[0]:.2f} to {losses[-1]:.2f}, {accuracy(model, *signs['test']):.1f} %")
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    copies = {key: tensor for key, tensor in model.state_dict().items() if ".bn_only_layers." in key}
    found = {
        key.replace(".bn_only_layers.default", "").removeprefix("base_model.model."): t for key, t in copies.items()
    }
    assert len(statistics) == 2 * 49
    assert all(torch.equal(tensor, found[key]) for key, tensor in statistics.items())
    model.save_pretrained(tmp_path)
    again = load_bn_only_model(tmp_path, pretrained(num_classes=CLASSES))
    assert torch.equal(again(signs["test"][0][:64]), model(signs["test"][0][:64]))
