"""Data: real images come out as they went in, and every process gets its part of the same batches."""

import ast
import hashlib
import io
import pickle
import random
import warnings
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from conftest import each_once
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_transform
from torchvision.transforms import functional as T

from bn_affine_adapters.errors import ConfigError, DataError
from bn_affine_adapters.training import data
from bn_affine_adapters.training.data import (
    Batch,
    Split,
    TensorData,
    batches,
    check_classes,
    decode,
    epoch_order,
    eval_batches,
    load_splits,
    steps_per_epoch,
    stream,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = {"data_seed": 3, "epoch": 1, "mean": MEAN, "std": STD, "flip": False, "crop_padding": 0}
FULL = {**PLAIN, "flip": True, "crop_padding": 2}


@pytest.fixture(scope="module", autouse=True)
def no_trace(tmp_path_factory):
    """Let `datasets` write its cache where it goes away with the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def digits() -> tuple[Split, Split]:
    return load_splits("digits")


@pytest.fixture(scope="module")
def held_out(digits) -> TensorData:
    return decode(digits[1], size=8)


@pytest.fixture
def folder(tmp_path):
    """Write splits as a folder of parquet files, as on the Hub."""

    def write(**splits):
        for name, rows in splits.items():
            rows.to_parquet(tmp_path / f"{name}-00000-of-00001.parquet")
        return str(tmp_path)

    return write


def coded(rows, images, kind="PNG"):
    """Return a split of these PIL images, coded as files of this kind, with the labels of the first rows."""
    files = [io.BytesIO() for _ in images]
    for file, image in zip(files, images, strict=True):
        image.save(file, kind)
    features = datasets.Features(image=datasets.Image(), label=rows.dataset.features["label"])
    columns = {
        "image": [{"bytes": f.getvalue(), "path": None} for f in files],
        "label": rows.dataset["label"][: len(files)],
    }
    return replace(rows, dataset=datasets.Dataset.from_dict(columns, features=features))


def test_the_held_out_fifth_of_digits_never_changes(held_out):
    values, labels = load_digits(return_X_y=True)
    expected = np.floor(values[4::5] * 255 / 16 + 0.5).astype(np.uint8)
    assert np.array_equal(held_out.images[:, 0].flatten(1), expected)
    assert np.array_equal(held_out.labels, labels[4::5])
    assert len(held_out) == 359
    digest = hashlib.sha256(held_out.images[:, 0].numpy().tobytes() + bytes(held_out.labels.tolist())).hexdigest()
    assert digest[:16] == "29426e79d10f8c0a"


def test_the_two_parts_of_digits_are_all_of_it(digits):
    train, test = digits
    assert (len(train.dataset), len(test.dataset)) == (1438, 359)
    assert train.label_names == test.label_names == tuple("0123456789")
    pixels = [decode(split, size=8, channels=1).images.flatten(1) for split in digits]
    rows = {bytes(row) for part in pixels for row in part.numpy()}
    assert len(rows) == len({bytes(row) for row in load_digits().data.astype(np.uint8)}) > 1700


@pytest.mark.parametrize(
    ("name", "image", "size", "classes", "rows"),
    [
        ("cifar10", "img", 32, 10, (50_000, 10_000)),
        ("fashion_mnist", "image", 28, 10, (60_000, 10_000)),
        ("gtsrb-32-mini", "image", 32, 43, (4_300, 2_150)),
    ],
)
def test_a_folder_loads_and_decodes_to_the_pixels_that_pil_sees(bnaa_data, name, image, size, classes, rows):
    train, test = load_splits(str(bnaa_data / name))
    assert (train.image_column, train.label_column, len(train.label_names)) == (image, "label", classes)
    assert (len(train.dataset), len(test.dataset)) == rows
    check_classes(train, classes)
    few = replace(train, dataset=train.dataset.select(range(0, rows[0], rows[0] // 100)))
    decoded = decode(few, size=size)
    seen = 0
    for row, pixels, label in zip(few.dataset, decoded.images, decoded.labels, strict=True):
        assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(row[image].convert("RGB")))
        assert label == row["label"]
        seen += 1
    assert seen >= 100


def test_worker_processes_decode_the_same_in_the_same_order(bnaa_data):
    train, _ = load_splits(str(bnaa_data / "gtsrb-32-mini"))
    assert len(train.dataset) >= 4096, "no longer enough images for workers by default"
    with_workers, without = decode(train, size=32), decode(train, size=32, workers=0)
    assert torch.equal(with_workers.images, without.images)
    assert torch.equal(with_workers.labels, without.labels)


def test_grey_images_become_three_equal_channels_or_stay_one(digits, held_out):
    one = decode(digits[1], size=8, channels=1)
    assert one.images.shape == (359, 1, 8, 8)
    assert torch.equal(held_out.images, one.images.expand(-1, 3, -1, -1))


@each_once(mode=["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "transparent P"], channels=[1, 3])
def test_every_8_bit_mode_decodes_without_a_warning(digits, mode, channels):
    images = [digits[1].dataset[i]["image"] for i in range(5)]
    tinted = [Image.merge("RGB", (i, i.rotate(90), i.rotate(180))) for i in images]
    if mode == "transparent P":
        images = [i.quantize(16) for i in tinted]
        for image in images:
            image.info["transparency"] = bytes(range(16))
    else:
        images = [i.convert(mode) for i in (images if mode in ("1", "L", "LA") else tinted)]
    split = coded(digits[1], images, "TIFF" if mode == "CMYK" else "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode(split, size=8, channels=channels).images
    wanted = "RGB" if channels == 3 else "L"
    for pixels, image in zip(decoded, images, strict=True):
        image.info.pop("transparency", None)
        if image.mode == "P":
            image = image.convert("RGB")
        assert np.array_equal(pixels.permute(1, 2, 0).squeeze(2), np.asarray(image.convert(wanted)))
    assert decoded.unique().numel() > 1


def test_another_size_is_resized_by_pil_bilinear(digits):
    split = coded(digits[1], [digits[1].dataset[i]["image"].resize((9, 13)) for i in range(6)])
    decoded = decode(split, size=20, channels=1).images
    for row, pixels in zip(split.dataset, decoded, strict=True):
        assert np.array_equal(pixels[0], np.asarray(row["image"].resize((20, 20), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(digits, refused, workers):
    split = coded(digits[1], [digits[1].dataset[i]["image"] for i in range(4)])
    cells = split.dataset.to_dict()
    cells["image"][2]["bytes"] = cells["image"][2]["bytes"][:40]
    broken = replace(split, dataset=datasets.Dataset.from_dict(cells, features=split.dataset.features))
    with refused(DataError, "image 2"):
        decode(broken, size=8, workers=workers)
    message = ""
    try:
        list(stream(broken, T.to_tensor, batch_size=2, data_seed=0, shuffle=False, workers=workers))
    except ValueError as error:  # without its traceback, which torch's workers would wait for
        message = str(error.with_traceback(None))
    assert "image 2" in message


def test_16_bit_images_are_refused_instead_of_clipped(digits, refused):
    deep = Image.fromarray(np.asarray(digits[1].dataset[0]["image"]).astype(np.uint16) * 257)
    with refused(DataError, "image 0", "mode I;16", "8 bits"):
        decode(coded(digits[1], [deep]), size=8)


def test_a_folder_of_image_files_is_a_data_set(digits, tmp_path):
    for split, rows in zip(("train", "test"), digits, strict=True):
        for i in range(20):
            where = tmp_path / "files" / split / f"digit {rows.dataset[i]['label']}"
            where.mkdir(parents=True, exist_ok=True)
            rows.dataset[i]["image"].save(where / f"{i}.png")
    train, _ = load_splits(str(tmp_path / "files"))
    assert train.label_names == tuple(f"digit {i}" for i in range(10))
    assert decode(train, size=8).images.shape == (20, 3, 8, 8)


def test_columns_are_found_by_type_and_may_be_given(digits, folder):
    train, test = (rows.dataset.rename_columns({"image": "scan", "label": "digit"}) for rows in digits)
    loaded, _ = load_splits(folder(train=train.add_column("page", range(len(train))), test=test))
    assert (loaded.image_column, loaded.label_column) == ("scan", "digit")
    path = folder(**{n: rows.add_column("label", [0] * len(rows)) for n, rows in (("train", train), ("test", test))})
    assert load_splits(path)[0].label_column == "digit", "a class label goes before an integer"
    assert load_splits(path, label_column="label")[0].label_names == ("0",)


def test_integer_labels_are_classes_up_to_the_largest_in_train(digits, folder, refused):
    train, test = (rows.dataset.cast_column("label", datasets.Value("uint8")) for rows in digits)
    assert load_splits(folder(train=train, test=test))[1].label_names == tuple("0123456789")
    few = load_splits(folder(train=train.filter(lambda row: row["label"] < 8), test=test))
    assert few[1].label_names == tuple("01234567")
    with refused(DataError, "9"):
        decode(few[1], size=8)


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (lambda rows: rows.remove_columns("label"), {}, ["label_column", "image", "ClassLabel"]),
        (lambda rows: rows.remove_columns("image"), {}, ["image_column", "label"]),
        (lambda rows: rows.cast_column("label", datasets.Value("string")), {}, ["label_column", "string"]),
        (lambda rows: rows, {"label_column": "digit"}, ["'digit'", "image", "label"]),
        (lambda rows: rows, {"image_column": "label"}, ["image_column='label'"]),
        (lambda rows: rows.rename_column("label", "page").cast_column("page", datasets.Value("int64")), {}, ["page"]),
        (
            lambda rows: rows.rename_column("label", "fine_label").add_column(
                "coarse_label", [0] * len(rows), feature=datasets.ClassLabel(names=["digit"])
            ),
            {},
            ["2 columns", "fine_label", "coarse_label", "label_column="],
        ),
        (lambda rows: rows, {"test_split": "validation"}, ["'validation'", "train", "test"]),
    ],
)
def test_a_missing_or_ambiguous_column_or_split_is_refused_with_what_there_is(
    digits, folder, refused, change, arguments, words
):
    path = folder(train=change(digits[0].dataset), test=change(digits[1].dataset))
    with refused(DataError, *words):
        load_splits(path, **arguments)


def test_splits_of_different_columns_or_classes_are_refused(digits, refused, monkeypatch):
    train, test = (rows.dataset for rows in digits)
    other = test.cast_column("label", datasets.ClassLabel(names=[f"digit {i}" for i in range(10)]))
    for wrong, word in ((other, "digit 3"), (test.rename_column("image", "scan"), "scan")):
        splits = datasets.DatasetDict(train=train, test=wrong)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, splits=splits: splits)
        with refused(DataError, word):
            load_splits("somebody/digits")


@pytest.mark.parametrize("label", [-1, None])
def test_a_split_without_labels_is_refused(digits, refused, label):
    rows = digits[1].dataset
    unlabelled = rows.remove_columns("label").add_column("label", [label] * len(rows), feature=rows.features["label"])
    for use in (lambda s: decode(s, size=8), lambda s: stream(s, T.to_tensor, batch_size=2, data_seed=0, shuffle=True)):
        with refused(DataError, "-1: none", "'label'"):
            use(replace(digits[1], dataset=unlabelled))


def test_a_network_with_another_number_of_classes_is_refused(digits, held_out, refused):
    for known in (digits[0], held_out):
        check_classes(known, 10)
        with refused(DataError, "43 outputs, 10 classes", "num_classes=10"):
            check_classes(known, 43)


def test_an_epoch_is_drawn_by_the_documented_rule():
    digest = hashlib.sha256(b"bnaffine-data-v1/7/2").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    order, flips, offsets = epoch_order(5000, 7, 2, 4)
    assert torch.equal(order, torch.randperm(5000, generator=generator))
    assert torch.equal(flips, torch.rand(5000, generator=generator) < 0.5)
    assert torch.equal(offsets, torch.randint(9, (5000, 2), generator=generator))
    assert order.sort().values.tolist() == list(range(5000))
    assert 0.47 < flips.float().mean() < 0.53
    for axis in offsets.T:
        assert axis.bincount().min() > 5000 / 9 * 0.8


def test_epochs_and_data_seeds_differ_but_repeat(held_out):
    drawn = [epoch_order(359, seed, epoch)[0].tolist() for seed in (0, 1, -1) for epoch in (0, 1, 2)]
    again = [epoch_order(359, seed, epoch)[0].tolist() for seed in (0, 1, -1) for epoch in (0, 1, 2)]
    assert drawn == again
    assert len({tuple(order) for order in drawn}) == 9
    assert torch.equal(epoch_order(359, 0, 0, 4)[0], epoch_order(359, 0, 0)[0]), "augmentation changed the order"


def joined(parts: list[list[Batch]]) -> list[torch.Tensor]:
    """Join [rank][accumulation step] of one global batch."""
    ordered = [part for step in zip(*parts, strict=True) for part in step]
    return [torch.cat([part.images for part in ordered]), torch.cat([part.labels for part in ordered])]


@each_once(world=[1, 2, 3], accumulation=[1, 2], batch_size=[64, 50])
def test_the_parts_of_all_processes_join_to_the_single_batch_bit_for_bit(held_out, world, accumulation, batch_size):
    whole = list(batches(held_out, batch_size=batch_size, **FULL))
    assert [len(batch.labels) for batch in whole] == [batch_size] * (359 // batch_size) + [359 % batch_size]
    shape = {"batch_size": batch_size, "world": world, "accumulation": accumulation}
    ranks = [list(batches(held_out, rank=rank, **shape, **FULL)) for rank in range(world)]
    assert {len(parts) for parts in ranks} == {len(whole) * accumulation}
    for step, batch in enumerate(whole):
        parts = [rank[step * accumulation : (step + 1) * accumulation] for rank in ranks]
        images, labels = joined(parts)
        assert torch.equal(images, batch.images)
        assert torch.equal(labels, batch.labels)
        counts = [len(part.labels) for rank in parts for part in rank]
        assert max(counts) - min(counts) <= 1
        assert {part.global_count for rank in parts for part in rank} == {batch.global_count} == {sum(counts)}


def test_the_last_batch_is_kept_unless_dropped_or_too_small_to_share(held_out):
    assert steps_per_epoch(50_000, 128) * 160 == 62_560
    cases = [({}, 5), ({"world": 3}, 5), ({"world": 2, "accumulation": 2}, 4), ({"drop_remainder": True}, 4)]
    for share, steps in cases:
        made = list(batches(held_out, batch_size=89, **share, **PLAIN))
        assert len(made) == steps * share.get("accumulation", 1)
        assert steps_per_epoch(359, 89, **share) == steps
        assert made[-1].global_count == (3 if steps == 5 else 89)


@pytest.mark.parametrize(("size", "padding", "flip"), [(8, 2, True), (8, 0, True), (8, 1, False), (32, 4, True)])
def test_flips_and_crops_equal_those_of_one_image_after_another(digits, size, padding, flip):
    known = decode(digits[1], size=size)
    order, flips, offsets = epoch_order(len(known), 3, 1, padding)
    made = list(batches(known, batch_size=100, **{**FULL, "crop_padding": padding, "flip": flip}))
    images, labels = (torch.cat([getattr(batch, part) for batch in made]) for part in ("images", "labels"))
    for i, source in enumerate(order):
        padded = T.pad(known.images[source], padding)
        image = T.crop(padded, *offsets[i].tolist(), size, size)
        image = T.hflip(image) if flip and flips[i] else image
        torch.testing.assert_close(images[i], T.normalize(image / 255, MEAN, STD), rtol=0, atol=2e-6)
        assert labels[i] == known.labels[source]
    assert len(images) == 359
    assert 100 < flips.sum() < 259


def test_without_augmentation_the_images_only_change_order(held_out):
    order, *_ = epoch_order(359, 3, 1)
    made = torch.cat([batch.images for batch in batches(held_out, batch_size=359, **PLAIN)])
    plain = torch.cat([b.images for b in eval_batches(held_out, batch_size=100, mean=MEAN, std=STD)])
    assert torch.equal(made, plain[order])


def test_channels_last_changes_the_layout_alone(held_out):
    for cut in (batches(held_out, batch_size=64, **FULL), eval_batches(held_out, batch_size=64, mean=MEAN, std=STD)):
        assert next(cut).images.is_contiguous()
    last = {"memory_format": torch.channels_last}
    for a, b in zip(
        batches(held_out, batch_size=64, **FULL), batches(held_out, batch_size=64, **last, **FULL), strict=True
    ):
        assert b.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a.images, b.images)


@each_once(world=[1, 2, 3, 5], batch_size=[64, 179, 1000, 4])
def test_gathered_and_cut_predictions_are_all_images_in_order(held_out, world, batch_size):
    common = {"batch_size": batch_size, "mean": MEAN, "std": STD}
    whole = torch.cat([batch.images for batch in eval_batches(held_out, **common)])
    found, labels = [], []
    for parts in zip(*(eval_batches(held_out, rank=r, world=world, **common) for r in range(world)), strict=True):
        assert len({(part.images.shape, part.global_count) for part in parts}) == 1, "gather needs equal shapes"
        found.append(torch.cat([part.images for part in parts])[: parts[0].global_count])
        labels.append(torch.cat([part.labels for part in parts])[: parts[0].global_count])
    assert torch.equal(torch.cat(found), whole)
    assert torch.equal(torch.cat(labels), held_out.labels)


@pytest.mark.parametrize(
    ("wrong", "kind", "word"),
    [
        ({"world": 3, "batch_size": 2}, ConfigError, "world=3"),
        ({"accumulation": 0}, ConfigError, "accumulation=0"),
        ({"rank": 1}, ConfigError, "rank 1 of 1"),
        ({"mean": (0.5,)}, ConfigError, "1 means"),
        ({"batch_size": 400, "drop_remainder": True}, DataError, "359 images"),
    ],
)
def test_batches_that_cannot_be_cut_are_refused(held_out, refused, wrong, kind, word):
    with refused(kind, word):
        next(batches(held_out, **{"batch_size": 64, **PLAIN, **wrong}))


def test_two_channels_are_refused(digits, refused):
    with refused(ConfigError, "channels=2"):
        decode(digits[1], size=8, channels=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_gives_the_decoded_images_in_an_order_of_its_data_seed(digits, held_out, workers):
    loader = stream(digits[1], T.pil_to_tensor, batch_size=100, data_seed=5, shuffle=True, workers=workers)
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        images, labels = (torch.cat(part) for part in zip(*loader, strict=True))
        order = torch.tensor([row for _, row in loader.sampler])
        assert torch.equal(images, held_out.images[order])
        assert torch.equal(labels, held_out.labels[order])
        epochs.append(order.tolist())
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(359))


def test_an_unshuffled_stream_is_in_order_and_may_drop_the_remainder(digits, held_out):
    loader = stream(digits[1], T.pil_to_tensor, batch_size=100, data_seed=5, shuffle=False, drop_remainder=True)
    assert torch.equal(torch.cat([images for images, _ in loader]), held_out.images[:300])


def test_a_stream_of_timm_transforms_survives_pickling_and_repeats(digits):
    transform = create_transform((3, 16, 16), is_training=True, auto_augment="rand-m9")
    runs = []
    for _ in range(2):
        loader = stream(digits[1], transform, batch_size=64, data_seed=5, shuffle=True, workers=2)
        pickle.loads(pickle.dumps(loader.dataset))
        runs.append(next(iter(loader)))
    assert runs[0][0].shape == (64, 3, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_stream_draws_for_an_image_follows_from_its_row_and_the_epoch_alone(workers, digits):
    transform = create_transform((3, 16, 16), is_training=True, auto_augment="rand-m9")
    found = []
    for size, here in ((64, workers), (50, 0)):
        loader = stream(digits[1], transform, batch_size=size, data_seed=5, shuffle=True, workers=here)
        loader.sampler.set_epoch(3)
        states = random.getstate(), torch.get_rng_state()
        found.append(torch.cat([images for images, _ in loader]))
        assert random.getstate() == states[0]
        assert torch.equal(torch.get_rng_state(), states[1])
    assert torch.equal(*found)
    before = [row for _, row in loader.sampler]
    loader.sampler.set_epoch(4)
    same_rows = [before.index(row) for _, row in loader.sampler]
    assert not torch.equal(torch.cat([images for images, _ in loader]), found[0][same_rows])


def test_accelerate_shards_a_stream_and_sets_its_epoch(digits):
    share = {}
    for rank in range(2):
        loader = stream(digits[1], T.pil_to_tensor, batch_size=50, data_seed=5, shuffle=True)
        prepared = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        for epoch in (0, 1):
            prepared.set_epoch(epoch)
            share[rank, epoch] = torch.cat([labels for indices, labels in prepared])
            assert loader.sampler.epoch == epoch
    for epoch in (0, 1):
        dealt = torch.cat([share[rank, epoch].split(50)[i] for i in range(4) for rank in range(2)])[:359]
        loader.sampler.set_epoch(epoch)
        assert dealt.tolist() == [digits[1].dataset["label"][row] for _, row in loader.sampler]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: is its batch that of the CPU?")
def test_a_gpu_makes_the_batches_of_the_cpu(held_out):
    ours, theirs = (batches(split, batch_size=64, **FULL) for split in (held_out, held_out.to("cuda")))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.labels, b.labels.cpu())
        torch.testing.assert_close(a.images, b.images.cpu(), rtol=0, atol=1e-6)


def test_nothing_behind_an_extra_is_imported_at_the_top():
    tree = ast.parse(Path(data.__file__).read_text())
    top = {a.name.split(".")[0] for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    top |= {n.module.split(".")[0] for n in tree.body if isinstance(n, ast.ImportFrom) and not n.level}
    assert "torch" in top, "found no imports"
    assert not top & {"datasets", "sklearn", "accelerate", "evaluate"}
