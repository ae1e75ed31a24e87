"""One batch, several adapters: each image gets what its own adapter gives, or an error says why not."""

import copy
import threading
import time

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, predict
from bn_affine_adapters.adapter.layer import adapter_layers
from bn_affine_adapters.errors import AdapterError, AdapterNameError

pytestmark = pytest.mark.filterwarnings("ignore:This adapter belongs to weights")
NAMES = ["signs", "leaves", "__base__", "tiles", "leaves", "signs", "signs"]


def images(count=7, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def disturb(model, name, seed):
    """Give an adapter values of its own, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in model.state_dict().items():
        if f".{name}." in key and tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.5)


def adapters(network, classes=3, **settings):
    """Return a network with three adapters: one of all layers, one with another head, one of every second layer."""
    model = get_bn_only_model(network, BNOnlyConfig(train_head=True, **settings), "signs")
    model.add_adapter("leaves", BNOnlyConfig(train_head=True, model_args={"num_classes": classes}, **settings))
    norms = model.peft_config["signs"].norm_layers[::2]
    model.add_adapter("tiles", BNOnlyConfig(norm_layers=norms, **settings))
    for seed, name in enumerate(model.peft_config):
        disturb(model, name, seed)
    return model.eval()


def resnet(classes=3, **settings):
    return adapters(timm.create_model("test_resnet", num_classes=5), classes, **settings)


@torch.no_grad()
def apart(model, x, names):
    """Return what each image's own adapter gives, one image after another."""
    before, logits = model.active_adapter, []
    for image, name in zip(x, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                logits.append(model(image[None])[0])
        else:
            model.set_adapter(name, inference_mode=True)
            logits.append(model(image[None])[0])
    model.set_adapter(before)
    return logits


def equal(found, expected, tolerance=1e-5):
    assert len(found) == len(expected)
    assert [each.shape for each in found] == [each.shape for each in expected]
    scale = max(each.abs().max() for each in expected)
    return all(
        torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale) for a, b in zip(found, expected, strict=True)
    )


NETWORKS = [name for name in timm.list_models("test_*") if name != "test_nfnet"]  # which has no norm layer
SLOW = ["swin_tiny_patch4_window7_224", "tnt_s_legacy_patch16_224", "mobilevit_xxs", "convnextv2_atto", "regnetz_005"]


@pytest.mark.parametrize(
    "name",
    # In LeViT, BatchNorm1d gets the tokens of all images as entries, and two heads are averaged.
    [*NETWORKS, "levit_128s", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW if timm.is_model(name))],
)
def test_each_image_gets_what_its_own_adapter_gives(name):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5)
    model = adapters(network, classes=5 if name.startswith("levit") else 3)
    x = images(size=network.pretrained_cfg["input_size"][-1])
    expected = apart(model, x, NAMES)
    assert equal(model(x, adapter_names=NAMES), expected)
    assert not equal(model(x, adapter_names=["signs"] * 7), apart(model, x, ["tiles"] * 7))


OWNED = {
    "two weights": {"control": "two_weights", "seed": 0},
    "input affine": {"control": "input_affine"},
    "mask": {"control": "mask", "seed": 0},
    "a whole module": {"extra_trainable_modules": ["layer1.0"]},
}


@pytest.mark.parametrize("owned", OWNED.values(), ids=OWNED)
def test_other_layers_of_an_adapter_are_mixed_too(owned):
    model = adapters(timm.create_model("test_resnet", num_classes=5), **owned)
    assert equal(model(images(), adapter_names=NAMES), apart(model, images(), NAMES))


def test_all_is_right_to_the_last_digits_in_double_precision():
    model, x = resnet().double(), images().double()
    assert equal(model(x, adapter_names=NAMES), apart(model, x, NAMES), tolerance=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "autocast"], ids=str)
def test_in_half_precision_it_is_as_near_as_the_precision(dtype):
    model, x = resnet(), images()
    expected = apart(model, x, NAMES)
    if dtype == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x, adapter_names=NAMES)
    else:
        found = model.to(dtype)(x.to(dtype), adapter_names=NAMES)
    assert found[0].dtype == torch.bfloat16
    assert equal([each.float() for each in found], expected, tolerance=0.05)


# -- heads


def test_heads_of_different_widths_give_a_list_or_are_padded():
    model, x = resnet(), images()
    apiece = model(x, adapter_names=NAMES)
    assert [len(each) for each in apiece] == [5, 3, 5, 5, 3, 5, 5]
    padded = model(x, adapter_names=NAMES, padded=True)
    assert padded.shape == (7, 5)
    for row, own in zip(padded, apiece, strict=True):
        assert torch.equal(row[: len(own)], own)
        assert (row[len(own) :] == -torch.inf).all()
        assert torch.allclose(row.softmax(0)[: len(own)], own.softmax(0))


def test_heads_of_one_width_give_a_tensor():
    model, x = resnet(), images(2)
    for names, classes in ((["leaves"] * 2, 3), (["signs", "tiles"], 5), (["__base__", "signs"], 5)):
        for padded in (False, True):
            logits = model(x, adapter_names=names, padded=padded)
            assert logits.shape == (2, classes)
    assert isinstance(resnet(classes=5)(images(), adapter_names=NAMES), torch.Tensor)
    with pytest.raises(TypeError, match="padded"):
        model(x, padded=True)


# -- never stale


def edit(model):
    with torch.no_grad():
        model.get_submodule("base_model.model.bn1").bn_only_layers["leaves"].bias.add_(1)


def train(model):
    model.set_adapter("leaves")
    model.train()
    model(images(4)).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.eval()


def replace(model):
    model.delete_adapter("leaves")
    model.add_adapter("leaves", BNOnlyConfig(train_head=True, model_args={"num_classes": 3}))
    disturb(model, "leaves", 9)


def delete_another(model):
    model.delete_adapter("signs")


def add_another(model):
    model.add_adapter("late", BNOnlyConfig())
    disturb(model, "late", 9)


def load(model, folder="stale"):
    disturb(model, "leaves", 11)
    state = {key: tensor * 2 for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    model.load_state_dict(state, strict=False)


CHANGES = (edit, train, replace, delete_another, add_another, load, nn.Module.double)


@pytest.mark.filterwarnings("ignore:Adapter signs was active")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_has_changed_since_the_last_batch_is_seen(change):
    model, x = resnet(), images(3)
    names = ["tiles", "leaves", "__base__"]
    before = model(x, adapter_names=names)
    change(model)
    x = x.to(next(model.parameters()).dtype)
    names = ["late", *names[1:]] if change is add_another else names
    expected = apart(model, x, names)
    assert equal(model(x, adapter_names=names), expected)
    if change not in (delete_another, nn.Module.double):
        assert not equal(before, expected)


def test_copies_of_a_model_and_parts_of_it_have_batches_of_their_own():
    model, x = resnet(), images()
    expected = model(x, adapter_names=NAMES)
    twin = copy.deepcopy(model)
    edit(twin)
    assert equal(twin(x, adapter_names=NAMES), apart(twin, x, NAMES))
    assert equal(model(x, adapter_names=NAMES), expected)
    model.get_base_model().layer1 = copy.deepcopy(model.get_base_model().layer1)
    assert equal(model(x, adapter_names=NAMES), expected)


def test_the_model_is_as_before():
    model, x = resnet(), images()
    before, state = model(x), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    logits = model(x, adapter_names=NAMES)
    assert not any(each.requires_grad for each in logits)
    assert torch.equal(model(x), before)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in state.items())
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="size"):  # an error on the way ends the batch too
        model(torch.zeros(7, 1, 32, 32), adapter_names=NAMES)
    assert torch.equal(model(x), before)


def test_threads_run_their_own_batches_side_by_side():
    model = resnet()
    batches = [images(8), images(8).flip(0), images(8) * 2]
    names = [["signs", "leaves"] * 4, ["tiles", "__base__"] * 4, None]
    expected = [model(x, adapter_names=own) for x, own in zip(batches, names, strict=True)]
    wrong = []

    def serve(number):
        for _ in range(30):
            found = model(batches[number], adapter_names=names[number])
            if not all(torch.equal(a, b) for a, b in zip(found, expected[number], strict=True)):
                wrong.append(number)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- torch.compile


class Small(nn.Module):
    """A network that is traced in no time."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.LayerNorm(4)
        self.head, self.num_classes = nn.Linear(4, 5), 5

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(self.norm(self.act(self.bn(self.conv(x))).mean((2, 3))))


NEW = torch.__version__ >= (2, 14)  # older versions make a graph more for some lists of names


def small():
    return adapters(Small(), architecture="custom")


def test_one_graph_serves_every_mixture(clean_compiler):
    model, counter = small(), CompileCounter()
    compiled, x = torch.compile(model, backend=counter), images()
    mixtures = (NAMES, NAMES[::-1], ["leaves"] * 7, ["tiles", "__base__", "signs"] * 2 + ["tiles"])
    for names in mixtures:
        assert equal(compiled(x, adapter_names=names), apart(model, x, names))
    assert counter.frame_count == (1 if NEW else 3)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    disturb(model, "leaves", 9)
    assert equal(compiled(x, adapter_names=NAMES), apart(model, x, NAMES))
    assert counter.frame_count <= (2 if NEW else 4)  # one more is that of the active adapter alone
    with torch._dynamo.config.patch(recompile_limit=2):  # graphs that PyTorch makes of a function
        for count in range(1, 5):
            assert equal(
                compiled(images(count), adapter_names=NAMES[:count]), apart(model, images(count), NAMES[:count])
            )


def test_a_network_compiled_inside_the_model_takes_mixed_batches(clean_compiler):
    model, x, counter = small(), images(), CompileCounter()
    expected = apart(model, x, NAMES)
    model.get_base_model().compile(backend=counter, fullgraph=True)
    assert equal(model(x, adapter_names=NAMES), expected)
    assert equal(model(x, adapter_names=NAMES[::-1]), apart(model, x, NAMES[::-1]))
    with torch.no_grad():
        assert torch.allclose(model(x)[0], model(x[:1])[0], atol=1e-5)
    assert counter.frame_count >= 2


# -- refused


def training(model):
    model.train()


def training_inside(model):
    model.get_base_model().layer1.train()


def merged(model):
    model.merge_adapter(["leaves"])


def disabled(model):
    model.base_model.disable_adapter_layers()


REFUSED = {
    "training": (training, NAMES, ("evaluation mode", "model.eval()")),
    "training inside": (training_inside, NAMES, ("evaluation mode", "model.eval()")),
    "merged": (merged, NAMES, ("merged: leaves", "unmerge_adapter")),
    "disabled": (disabled, NAMES, ("disabled", "__base__")),
    "unknown": (bool, ["sings", *NAMES[1:]], ("'sings'", "nearest name is 'signs'", "load_adapter")),
    "too few": (bool, NAMES[:3], ("3 names, 7 images",)),
    "too many": (bool, NAMES * 2, ("14 names, 7 images",)),
    "one name": (bool, "signs", ("'signs'", "a name for each image")),
    "no names": (bool, [None] * 7, ("a name for each image",)),
    "an empty list": (bool, [], ("a name for each image",)),
}


@pytest.mark.parametrize(("change", "names", "words"), REFUSED.values(), ids=REFUSED)
def test_a_batch_that_cannot_be_mixed_is_refused(change, names, words, refused):
    model = resnet()
    change(model)
    for run in (model, torch.compile(model, backend="eager")):
        with refused(AdapterError, *words):
            run(images(), adapter_names=names)


def test_layer_scales_that_train_are_refused_by_name(refused):
    network = timm.create_model("test_convnext", num_classes=5)
    model = adapters(network, layer_scale="train")
    with refused(AdapterError, "stages.0.blocks.0.gamma", "'signs'"):
        model(images(), adapter_names=NAMES)
    assert equal(model(images(2), adapter_names=["__base__"] * 2), apart(model, images(2), ["__base__"] * 2))
    frozen = adapters(timm.create_model("test_convnext", num_classes=5), layer_scale="one", seed=0)
    assert equal(frozen(images(), adapter_names=NAMES), apart(frozen, images(), NAMES))


class Plain(nn.Module):
    """A network of the user's own code."""

    def __init__(self, norm, run):
        super().__init__()
        self.conv, self.norm, self.run = nn.Conv2d(3, 4, 3), norm, run

    def forward(self, x):
        return self.run(self, self.conv(x)).mean((2, 3))


def timewise(network, x):
    return network.norm(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (4, -1)).transpose(0, 1)


IMPOSSIBLE = {
    "the batch's statistics": (nn.BatchNorm2d(4, track_running_stats=False), lambda n, x: n.norm(x), "running stat"),
    "entries in any order": (nn.LayerNorm(30), timewise, "one entry for each image"),
    "tensors that are read": (nn.BatchNorm2d(4), lambda n, x: x * n.norm.weight[:, None, None], "its weight"),
    "other tensors that are read": (nn.BatchNorm2d(4), lambda n, x: n.norm.running_mean * 0 + 1, "running_mean"),
    "images that are dropped": (nn.BatchNorm2d(4), lambda n, x: n.norm(x[:2]), "2 entries for 3 images"),
    "two arguments": (nn.Bilinear(30, 30, 30), lambda n, x: n.norm(x, x), "takes one tensor"),
    "two results": (nn.Module(), lambda n, x: n.norm(x)[0], "returns one tensor"),
}


@pytest.mark.parametrize(("norm", "run", "words"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_layer_that_images_of_several_adapters_cannot_pass_is_refused_by_name(norm, run, words, refused):
    if type(norm) is nn.Module:
        norm = type("Two", (nn.BatchNorm2d,), {"forward": lambda self, x: (x, x)})(4)
    network = nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)), Plain(norm, run))
    extra = {"extra_trainable_modules": ["1.norm"]} if isinstance(norm, nn.Bilinear) else {}
    model = get_bn_only_model(network, BNOnlyConfig(architecture="custom", **extra), "signs")
    model.add_adapter("leaves", BNOnlyConfig(architecture="custom", **extra))
    with refused(AdapterError, "1.norm", words, "set_adapter"):
        model.eval()(images(3), adapter_names=["signs", "leaves", "signs"])


def test_a_head_whose_width_the_output_does_not_show_is_refused(refused):
    model = resnet()
    base = model.get_base_model()
    forward = type(base).forward
    base.forward = lambda x: (forward(base, x), x)
    with refused(AdapterError, "different widths", "tuple"):
        model(images(), adapter_names=NAMES)


# -- switching


def test_an_adapter_brings_its_classes_label_names_and_layers():
    model = resnet()
    model.peft_config["signs"].label_names = list("abcde")
    model.peft_config["leaves"].label_names = list("xyz")
    photo = torch.zeros(3, 32, 32)
    labels = {}
    for name in ("signs", "leaves", "tiles"):
        model.set_adapter(name, inference_mode=True)
        labels[name] = {prediction.label for prediction in predict(model, photo)}
        assert model.num_classes == model(images()).shape[1] == len(labels[name])
    assert labels == {"signs": {*"abcde"}, "leaves": {*"xyz"}, "tiles": {*"01234"}}


def test_no_adapter_can_have_the_name_of_the_base(refused):
    with refused(AdapterNameError, "'__base__'"):
        resnet().add_adapter("__base__", BNOnlyConfig())


@pytest.mark.parametrize("do", ["set_adapter", "delete_adapter"])
def test_an_unknown_adapter_is_refused_with_the_nearest_name(do, refused):
    with refused(AdapterError, "'sings'", "nearest name is 'signs'", "leaves"):
        getattr(resnet(), do)("sings")


def test_switching_for_inference_turns_gradients_off():
    model = resnet()

    def training():
        return {
            key.split(".bn_only_layers.")[1].split(".")[0] for key, p in model.named_parameters() if p.requires_grad
        }

    model.set_adapter("leaves")
    assert training() == {"leaves"}
    model.set_adapter("signs", inference_mode=True)
    assert training() == set()
    model.set_requires_grad("tiles")
    assert training() == {"tiles"}
    model.set_adapter("leaves", inference_mode=True)
    assert training() == set()
    for name in ("signs", "leaves"):
        model.delete_adapter(name)
    model.set_adapter("tiles")
    assert training() == {"tiles"}


def test_switching_for_inference_takes_as_long_with_many_adapters_as_with_few():
    model, times = resnet(), []

    def seconds(name):
        start = time.process_time()
        model.set_adapter(name, inference_mode=True)
        return time.process_time() - start

    for count in (3, 43):
        while len(model.peft_config) < count:
            name = f"late_{len(model.peft_config)}"
            model.peft_config[name] = model.peft_config["tiles"]
            for layer in adapter_layers(model):
                if "tiles" in layer.configs:
                    layer.add_copy(name, layer.copy_of_base(), layer.configs["tiles"])
        times.append(min(seconds(name) for name in ["signs", "leaves", "tiles"] * 10))
    assert times[1] < 2 * times[0]
