"""A picture is the same to predict, to evaluation in memory and streamed, and to a plain pipeline of timm."""

import json
import shutil
from copy import copy
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import each_once
from PIL import Image, ImageOps
from PIL.Image import Transpose
from sklearn.datasets import load_sample_images
from timm.data import create_transform

from bn_affine_adapters import load_bn_only_model, predict
from bn_affine_adapters.errors import ConfigError, DataError
from bn_affine_adapters.model.images import CROP_MODES, INTERPOLATIONS, evaluation_transform, normaliser, open_image
from bn_affine_adapters.study import analyse
from bn_affine_adapters.training import train, validate
from bn_affine_adapters.training.data import Split, decode, load_splits, stream
from bn_affine_adapters.training.feed import DataOptions, Feed, own_options

GOLDEN = Path(__file__).parents[1] / "golden" / "adapter-v1"
SQUARE = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "interpolation": "bilinear"}
GREY = {**SQUARE, "input_size": [1, 32, 32], "mean": [0.5], "std": [0.2]}


@pytest.fixture(autouse=True)
def each_run_begins_as_in_a_process_of_its_own():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def no_trace(tmp_path, monkeypatch):
    """Let `datasets` write its cache where it goes away with the tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def photos():
    """Return crops of two photographs, of several shapes, each in colour."""
    china, flower = (Image.fromarray(image) for image in load_sample_images().images)
    boxes = [(250, 200, 347, 264), (200, 50, 250, 171), (300, 200, 340, 240), (150, 100, 420, 310)]
    return [photo.crop(box) for box in boxes for photo in (china, flower)]


def split_of(*files):
    """Return a split of image files, as `datasets` reads a folder."""
    rows = {"image": [str(file) for file in files], "label": [0] * len(files)}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["photo"]))
    return Split(datasets.Dataset.from_dict(rows, features=features), "image", "label", ("photo",), "test")


def doors(file, config):
    """Return the uint8 pixels of a file by each way to the network."""
    channels, *size = config["input_size"]
    transform, split = evaluation_transform(config), split_of(file)
    how = {key: config[key] for key in ("mean", "std", "interpolation")}
    opened = Image.open(file)
    return {
        "predict, a file": transform(open_image(file, channels)),
        "predict, a PIL image": transform(open_image(opened, channels)),
        "predict, decoded by datasets": transform(open_image(split.dataset[0]["image"], channels)),
        "memory": decode(split, size=size, channels=channels, crop_pct=0.875, crop_mode="center", **how).images[0],
        "streamed": next(stream(split, transform, batch_size=1, epoch=None, channels=channels)).images[0],
    }


def plain_timm(image, config):
    """Return what timm's own pipeline makes of an upright image."""
    return create_transform(**config, is_training=False)(image.convert("L" if config["input_size"][0] == 1 else "RGB"))


def palette(photo, alpha):
    image = photo.quantize(32)
    if alpha:
        image.info["transparency"] = bytes(range(0, 256, 8)) if alpha == "bytes" else 3
    return image


MODES = {
    "1": lambda photo: photo.convert("1"),
    "L": lambda photo: photo.convert("L"),
    "LA": lambda photo: with_alpha(photo).convert("LA"),
    "P": lambda photo: palette(photo, None),
    "P with a transparent colour": lambda photo: palette(photo, "index"),
    "P with alpha": lambda photo: palette(photo, "bytes"),
    "RGB": lambda photo: photo,
    "RGB with a transparent colour": lambda photo: transparent(photo),
    "RGBA": lambda photo: with_alpha(photo),
    "CMYK": lambda photo: photo.convert("CMYK"),
}


def with_alpha(photo):
    photo = photo.copy()
    photo.putalpha(Image.linear_gradient("L").resize(photo.size))
    return photo


def transparent(photo):
    photo = photo.copy()
    photo.info["transparency"] = photo.getpixel((3, 3))
    return photo


def lab(photo):
    from PIL import ImageCms

    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    return ImageCms.applyTransform(photo, ImageCms.buildTransform(*profiles, "RGB", "LAB"))


def save(image, file):
    """Save an image with its transparency: as a TIFF, whatever its name, where PNG has no such mode."""
    transparency = image.info.get("transparency")
    more = {} if transparency is None else {"transparency": transparency}
    image.save(file, "TIFF" if image.mode == "CMYK" else "PNG", **more)


@each_once(mode=MODES, channels=[3, 1])
def test_every_mode_gives_the_same_pixels_through_every_door(photos, tmp_path, mode, channels):
    image, config = mode(photos[0]), GREY if channels == 1 else SQUARE
    save(image, file := tmp_path / "a.png")
    found = doors(file, config)
    first = found["predict, a file"]
    for door, pixels in found.items():
        assert torch.equal(pixels, first), door
    assert first.unique().numel() > (1 if image.mode == "1" else 50)
    image = image.convert("RGBA") if image.mode == "P" else image  # or PIL warns of transparent palettes
    ours = normaliser(config["mean"], config["std"])(first[None])[0]
    torch.testing.assert_close(ours, plain_timm(image, config), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["HSV", "LAB", "YCbCr", "PA", "La", "RGBa", "RGBX"])
def test_modes_that_pil_writes_to_no_file_are_taken(photos, mode):
    alpha = with_alpha(photos[0])
    image = {
        "HSV": lambda: photos[0].convert("HSV"), "PA": lambda: photos[0].quantize(64).convert("PA"),
        "La": lambda: alpha.convert("LA").convert("La"), "RGBa": lambda: alpha.convert("RGBa"),
        "RGBX": lambda: photos[0].convert("RGBX"), "YCbCr": lambda: photos[0].convert("YCbCr"),
        "LAB": lambda: lab(photos[0]),
    }[mode]()  # fmt: skip
    assert image.mode == mode
    expected = np.asarray(open_image(alpha.convert("LA") if mode == "La" else photos[0], 3)).astype(int)
    opaque = np.asarray(alpha)[:, :, 3] > (100 if mode in ("La", "RGBa") else -1)  # dark colours lose bits under alpha
    found = np.asarray(open_image(image, 3)).astype(int)
    assert np.abs(found - expected)[opaque].mean() < (12 if mode == "PA" else 3)


UPRIGHT_FROM = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_270,
}  # fmt: skip


def turned(upright, orientation, file):
    """Save an image so that it is upright if it is turned as its orientation says."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(UPRIGHT_FROM[orientation]) if orientation > 1 else upright
    stored.save(file, exif=exif, **({"lossless": True} if file.suffix == ".webp" else {}))


@each_once(orientation=range(1, 9), kind=["png", "tif", "jpg", "webp"])
def test_an_image_is_upright_through_every_door(photos, tmp_path, orientation, kind):
    turned(upright := photos[0], orientation, tmp_path / f"a.{kind}")
    found = doors(tmp_path / f"a.{kind}", SQUARE)
    expected = evaluation_transform(SQUARE)(upright)
    for door, pixels in found.items():
        assert torch.equal(pixels, found["predict, a file"]), door
        assert (pixels.int() - expected.int()).abs().float().mean() <= (8 if kind == "jpg" else 0), door
    assert (expected.flip(1).int() - expected.int()).abs().float().mean() > 20


@pytest.mark.parametrize("kind", ["png", "tif", "big-endian tif"])
def test_16_bits_are_scaled_through_every_door(tmp_path, kind):
    ramp = np.arange(0, 65536, 16).reshape(64, 64)
    if kind.startswith("big"):
        Image.frombytes("I;16B", (64, 64), ramp.astype(">u2").tobytes()).save(file := tmp_path / "a.tif")
    else:
        Image.fromarray(ramp.astype(np.uint16)).save(file := tmp_path / f"a.{kind}")
    assert Image.open(file).mode.startswith("I;16")
    assert np.array_equal(np.asarray(open_image(file, 1)), np.round(ramp / 257))
    found = doors(file, SQUARE)
    for door, pixels in found.items():
        assert torch.equal(pixels, found["memory"]), door
    assert open_image(ramp.astype(np.uint16), 1) == open_image(file, 1)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_range_are_refused_through_every_door(tmp_path, refused, mode):
    Image.new(mode, (40, 40), 300).save(file := tmp_path / "a.tif")
    split, said = split_of(file), [f"mode {mode}", "scale them to 8 or 16 bits"]
    ways = [
        lambda: open_image(file, 3),
        lambda: open_image(Image.open(file), 3),
        lambda: decode(split, size=8),
        lambda: list(stream(split, evaluation_transform(SQUARE), batch_size=1, epoch=None)),
    ]
    for way in ways:
        with refused(DataError, *said):
            way()


def folder_of(photos, where):
    """Write a train and a test split of two classes; to test: every shape, every mode, every orientation."""
    for folder in [where / split / name for split in ("train", "test") for name in ("dog", "cat")]:
        folder.mkdir(parents=True)
        for i, photo in enumerate(photos[:4]):
            photo.save(folder / f"RGB, several shapes no. {i}.png")
    for name, mode in MODES.items():
        save(mode(photos[0]), folder / f"{name}.png")
    wide = np.asarray(photos[0].convert("L")).astype(np.uint16) * 257
    Image.fromarray(wide).save(folder / "16 bits.png")
    for orientation in range(1, 9):
        turned(photos[1], orientation, folder / f"RGB, EXIF orientations no. {orientation}.jpg")
    return where


DOORS = ("memory", "streamed", "predict")


def logits(model, feed):
    return torch.cat([model(batch.images) for batch in feed.evaluation()])


def upright_rgb(file):
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode == "I;16":  # timm alone would show it white
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert("RGBA") if image.mode == "P" else image


@torch.no_grad()
def differences(model, feed, config):
    """Return each door's distances from a plain pipeline of timm: of logits, and of predict's probabilities."""
    adapter = model.peft_config["default"]
    adapter.data_config = config
    files = [cell["path"] for cell in feed.test.dataset.cast_column("image", datasets.Image(decode=False))["image"]]
    expected = model(torch.stack([plain_timm(upright_rgb(file), config) for file in files]))
    assert expected.std(0).min() > 0.1, "all images look alike"
    found = {}
    for streaming in (False, True):
        other = copy(feed)
        other.options = DataOptions(**own_options(config), streaming=streaming, workers=0, batch_size=16)
        found["streamed" if streaming else "memory"] = logits(model, other) - expected
    predicted = [dict(best) for best in predict(model, files, top_k=10)]
    found["predict"] = torch.tensor([[best[name] for name in adapter.label_names] for best in predicted])
    found["predict"] -= expected.softmax(1)
    return {door: dict(zip(files, d.abs().amax(1).tolist(), strict=True)) for door, d in found.items()}


def test_every_door_gives_the_logits_of_timm(photos, tmp_path, capsys):
    """Run with -s for the tables in docs/your-images.md."""
    feed = Feed(DataOptions(dataset=str(folder_of(photos, tmp_path / "photos")), batch_size=4), Accelerator())
    model = load_bn_only_model(GOLDEN)
    ways = [(mode, kind, [3, 16, 16]) for mode in CROP_MODES for kind in INTERPOLATIONS]
    ways += [(mode, "bicubic", [3, 16, 24]) for mode in CROP_MODES]
    rows, images = {}, {}
    for mode, kind, size in ways:
        how = {**SQUARE, "input_size": size, "crop_pct": 0.7, "crop_mode": mode, "interpolation": kind}
        for door, distances in differences(model, feed, how).items():
            for file, value in distances.items():
                way = f"{mode}, {kind}, {size[1]} x {size[2]}", door
                image = Path(file).stem.partition(" no. ")[0], door
                rows[way] = max(rows.get(way, 0), value)
                images[image] = max(images.get(image, 0), value)
    with capsys.disabled():
        for title, table in (("crop_mode, interpolation, size", rows), ("image", images)):
            print(f"\n| {title} | memory | streamed | predict |\n|---|---|---|---|")
            for name in dict.fromkeys(name for name, _ in table):
                print(f"| {name} | " + " | ".join(f"{table[name, door]:.0e}" for door in DOORS) + " |")
    assert len(rows) == len(ways) * len(DOORS)
    assert len(images) == (len(MODES) + 3) * len(DOORS)
    assert max(rows.values()) < 1e-4


def labelled_by(model, where, names, count=4):
    """Write real digits of several shapes into folders called as the model predicts them: right is 100 %."""
    _, test = load_splits("digits")
    images = [image.resize((20 + i % 3 * 4, 20 + i % 5 * 2)) for i, image in enumerate(test.dataset["image"])]
    kept = dict.fromkeys(names, 0)
    for i, (image, (best,)) in enumerate(zip(images, predict(model, images, top_k=1), strict=True)):
        if kept[best.label] < count:
            kept[best.label] += 1
            for split in ("train", "test"):
                (where / split / best.label).mkdir(parents=True, exist_ok=True)
                image.save(where / split / best.label / f"{i}.png")
    assert min(kept.values()) > 0
    return sum(kept.values())


def golden_with(folder, **changes):
    """Copy the golden adapter, which reads digits, and change its configuration."""
    shutil.copytree(GOLDEN, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["data_config"] |= changes.pop("data_config", {})
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return load_bn_only_model(folder)


def measured(script, *arguments):
    result = script.run(script.read_options(list(arguments)))
    AcceleratorState._reset_state(reset_partial_state=True)
    return result


@each_once(streaming=["false", "true"])
def test_evaluation_prepares_images_as_the_adapter_says(tmp_path, streaming):
    """Before, a bicubic crop of 0.7 was evaluated as the whole image, bilinear."""
    how = {"interpolation": "bicubic", "crop_pct": 0.7, "crop_mode": "center"}
    model = golden_with(tmp_path / "adapter", data_config=how)
    images = labelled_by(model, tmp_path / "data", [*"0123456789"])
    more = [f"dataset={tmp_path / 'data'}", f"streaming={streaming}", "workers=0", "batch_size=16"]
    result = measured(validate, str(tmp_path / "adapter"), *more)
    assert result == {"top1": 100.0, "top5": 100.0, "split": "test", "images": images, "seed": 0}
    assert measured(validate, str(tmp_path / "adapter"), *more, "crop_mode=squash", "test_crop=1.0")["top1"] < 90


WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def test_evaluation_goes_by_the_names_of_the_classes(tmp_path, refused):
    """Folders are sorted, from eight to zero; the adapter's logits are not."""
    adapter, data = str(tmp_path / "adapter"), tmp_path / "data"
    model = golden_with(tmp_path / "adapter", label_names=WORDS)
    labelled_by(model, data, WORDS, count=3)
    for script, more in ((validate, ()), (validate, ("streaming=true", "workers=0", "batch_size=8")), (analyse, ())):
        assert measured(script, adapter, f"dataset={data}", *more)["top1"] == 100
    plain = f"adapter='{model_exported(model, tmp_path / 'plain')}'"
    assert measured(analyse, plain, f"dataset={data}")["top1"] == 100
    for split in ("train", "test"):
        (data / split / "nine").rename(data / split / "neun")
    for script, words in ((validate, adapter), (analyse, adapter), (analyse, plain)):
        with refused(DataError, "missing in the data: ['nine']", "unknown to the network: ['neun']"):
            measured(script, words, f"dataset={data}")


def model_exported(model, folder):
    from bn_affine_adapters import export

    return export(model, folder)


def test_a_checkpoint_of_other_classes_is_not_resumed(photos, tmp_path, refused):
    words = [
        f"dataset={folder_of(photos, tmp_path / 'data')}",
        "image_size=8",
        "batch_size=8",
        "epochs=1",
        "threads=1",
        "lr=0.01",
    ]
    words += [f"output_dir={tmp_path / 'run'}", "checkpoint_every=1", "resume=true"]
    train.train(train.read_recipe(words))
    AcceleratorState._reset_state(reset_partial_state=True)
    for split in ("train", "test"):
        (tmp_path / "data" / split / "cat").rename(tmp_path / "data" / split / "fish")
    with refused(ConfigError, "['cat', 'dog'] -> ['dog', 'fish']"):
        train.train(train.read_recipe(words))


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_grey_network_trains_evaluates_and_predicts(bnaa_data, tmp_path, streaming):
    rows = few(bnaa_data / "fashion_mnist", tmp_path / "data")
    more = [f"dataset={tmp_path / 'data'}", f"streaming={streaming}", "workers=0"]
    words = [*more, "model_args={in_chans: 1}", "image_size=16", "batch_size=64", "epochs=2", "threads=1", "flip=true"]
    words += ["crop_scale=[1.0,1.0]", "crop_ratio=[1.0,1.0]", "test_crop=1.0"]  # streamed, a fifth of an image is hard
    recipe = train.read_recipe([*words, f"output_dir={tmp_path / 'run'}"])
    assert recipe.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    (replicate,) = train.train(recipe)
    result = replicate.result
    AcceleratorState._reset_state(reset_partial_state=True)
    model = load_bn_only_model(result["adapter"])
    assert model.peft_config["default"].data_config["input_size"] == [1, 16, 16]
    assert measured(validate, result["adapter"], *more)["top1"] == result["top1"] > 12
    names = rows.features["label"].names
    best = predict(model, rows["image"], top_k=1)
    right = [names[label] == each[0].label for label, each in zip(rows["label"], best, strict=True)]
    assert 100 * sum(right) / len(right) == pytest.approx(result["top1"], abs=0.51)  # an image may lie on the edge


def few(source, where):
    """Write some of a data set's images as parquet files; return the rows of the test split."""
    whole = datasets.load_dataset(str(source))
    where.mkdir()
    for name, count in (("train", 512), ("test", 200)):
        rows = whole[name].select(range(count))
        rows.to_parquet(where / f"{name}-00000-of-00001.parquet")
    return rows
