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
    check_training,
    decode,
    epoch_order,
    eval_batches,
    hold_out,
    load_splits,
    numbered,
    readable,
    steps_per_epoch,
    stream,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = {"data_seed": 3, "epoch": 1, "mean": MEAN, "std": STD, "flip": False, "crop_padding": 0}
PLAIN_PIXELS = {"mean": (0,) * 3, "std": (1,) * 3, "crop_padding": 0}  # values in 0..1
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


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_broken_image_is_named(digits, refused, workers):
    split = coded(digits[1], [digits[1].dataset[i]["image"] for i in range(4)])
    cells = split.dataset.to_dict()
    cells["image"][2]["bytes"] = cells["image"][2]["bytes"][:40]
    broken = replace(split, dataset=datasets.Dataset.from_dict(cells, features=split.dataset.features))
    with refused(DataError, "image 2 of the split test"):
        decode(broken, size=8, workers=workers)
    with refused(DataError, "image 2 of the split test"):
        list(stream(broken, T.pil_to_tensor, batch_size=2, epoch=None, workers=workers))
    left, out = hold_out(broken, 1)  # in either part it is called by its place in the whole split
    with refused(DataError, "image 2 of the split test"):
        decode(left if 2 in left.rows else out, size=8, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_is_named_by_its_path(digits, refused, tmp_path, workers):
    for i in range(4):
        (tmp_path / f"train/{i % 2}").mkdir(parents=True, exist_ok=True)
        digits[1].dataset[i]["image"].save(tmp_path / f"train/{i % 2}/{i}.png")
    (tmp_path / "train/1/3.png").write_bytes(b"no image")
    train, _ = load_splits(str(tmp_path), held_out=1)
    with refused(DataError, str(Path("1", "3.png")), "of the split train"):
        decode(train, size=8, workers=workers)
    with refused(DataError, str(Path("1", "3.png")), "of the split train"):
        list(stream(train, T.pil_to_tensor, batch_size=2, epoch=0, workers=workers))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_truncated_image_is_named_when_it_is_streamed(digits, refused, kind):
    images = [digits[1].dataset[i]["image"].resize((64, 64)) for i in range(4)]
    split = coded(digits[1], images, kind)
    cells = split.dataset.to_dict()
    cells["image"][2]["bytes"] = cells["image"][2]["bytes"][: len(cells["image"][2]["bytes"]) * 2 // 3]
    broken = replace(split, dataset=datasets.Dataset.from_dict(cells, features=split.dataset.features))
    for epoch in (0, None):
        with refused(DataError, "image 2 of the split test"):
            list(stream(broken, T.pil_to_tensor, batch_size=2, epoch=epoch))
    left, problems = readable(broken)
    assert (len(left), left.rows, len(problems)) == (3, [0, 1, 3], 1)
    assert problems[0].startswith("image 2 of the split test: ")
    assert torch.equal(decode(left, size=64).labels, decode(split, size=64).labels[[0, 1, 3]])


def test_images_that_all_decode_are_all_kept(digits):
    left, problems = readable(digits[1], workers=2)
    assert (left, problems) == (digits[1], [])


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
    with refused(DataError, "9", "the first without is image 1 of the split test"):
        decode(few[1], size=8)


@pytest.mark.parametrize(
    ("labels", "word"),
    [([0, 100_000], "label 1"), ([0, 2**40], "label 1"), ([1, 2], "label 0"), ([0, 1, 5], "label 2")],
)
def test_integer_labels_that_leave_numbers_out_are_refused(labels, word, digits, folder, refused):
    """They are no names of classes, and 2**40 of these would fill the memory."""
    rows = digits[1].dataset.select(range(6)).remove_columns("label")
    path = folder(train=rows.add_column("label", [labels[i % len(labels)] for i in range(6)]))
    with refused(DataError, word, f"is {labels[-1]}", "ClassLabel"):
        load_splits(path)


def test_labels_that_leave_numbers_out_may_have_names(digits, folder, recwarn):
    kind = datasets.ClassLabel(names=["ant", "bee", "cat", "dog"])
    rows = digits[1].dataset.select(range(6)).remove_columns("label")
    path = folder(train=rows.add_column("label", [0, 3] * 3, feature=kind))
    train, _ = load_splits(path, held_out=2)
    assert train.label_names == ("ant", "bee", "cat", "dog")
    with pytest.warns(UserWarning, match="No image to train on is of 2 of 4 classes: bee, cat"):
        check_training(train)
    recwarn.clear()
    check_training(digits[0])
    assert not recwarn.list


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (lambda rows: rows.remove_columns("label"), {}, ["label_column", "image", "ClassLabel"]),
        (lambda rows: rows.remove_columns("image"), {}, ["image_column", "label"]),
        (lambda rows: rows.cast_column("label", datasets.Value("float32")), {}, ["label_column", "float32", "string"]),
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
    for use in (lambda s: decode(s, size=8), lambda s: stream(s, T.pil_to_tensor, batch_size=2, epoch=0)):
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


def test_images_that_are_left_join_the_last_batch_unless_there_are_two_for_each_part(held_out):
    assert steps_per_epoch(50_000, 128) * 160 == 62_560
    cases = [({}, 5, 3), ({"world": 2}, 4, 92), ({"world": 3}, 4, 92), ({"world": 2, "accumulation": 2}, 4, 92)]
    for share, steps, last in cases:
        made = list(batches(held_out, batch_size=89, **share, **PLAIN))
        assert len(made) == steps * share.get("accumulation", 1)
        assert steps_per_epoch(359, 89, **share) == steps
        assert made[-1].global_count == last


@pytest.mark.parametrize("n", [8, 9, 10, 16, 17, 18, 23])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_no_image_is_left_out_and_none_is_alone(held_out, n, parts):
    few = TensorData(held_out.images[:n], held_out.labels[:n], held_out.label_names)
    ranks = [list(batches(few, batch_size=8, rank=rank, world=parts, **PLAIN)) for rank in range(parts)]
    sizes = [len(batch.labels) for rank in ranks for batch in rank]
    assert sum(sizes) == n
    assert min(sizes) > 1
    assert max(sum(len(batch.labels) for batch in step) for step in zip(*ranks, strict=True)) <= 8 + 2 * parts - 1


def test_fewer_images_than_a_batch_are_one_step():
    assert [steps_per_epoch(n, 8) for n in (1, 2, 7, 8, 9, 10)] == [1, 1, 1, 1, 1, 2]
    assert [steps_per_epoch(n, 1) for n in (1, 2, 3)] == [1, 2, 3]
    assert [steps_per_epoch(n, 8, 4) for n in (4, 7, 8, 15, 16)] == [1, 1, 1, 1, 2]


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
        ({"batch_size": 400, "world": 400}, DataError, "359 images"),
    ],
)
def test_batches_that_cannot_be_cut_are_refused(held_out, refused, wrong, kind, word):
    with refused(kind, word):
        next(batches(held_out, **{"batch_size": 64, **PLAIN, **wrong}))


def test_two_channels_are_refused(digits, refused):
    with refused(ConfigError, "input_size=[2, 8, 8]"):
        decode(digits[1], size=8, channels=2)


@each_once(world=[1, 2, 3], accumulation=[1, 4], batch_size=[100, 10], workers=[0, 2])
def test_a_stream_has_the_micro_batches_of_memory(digits, held_out, world, accumulation, batch_size, workers):
    cut = {"batch_size": batch_size, "data_seed": 5, "accumulation": accumulation, "world": world}
    for rank in range(world):
        for epoch in (0, 1):
            known = batches(held_out, epoch=epoch, rank=rank, **cut, **{**PLAIN_PIXELS, "flip": False})
            shown = stream(digits[1], T.pil_to_tensor, epoch=epoch, rank=rank, workers=workers, **cut)
            found = 0
            for ours, theirs in zip(shown, known, strict=True):
                assert torch.equal(ours.images, (theirs.images * 255).round())
                assert torch.equal(ours.labels, theirs.labels)
                assert ours.global_count == theirs.global_count
                found += 1
            assert found == steps_per_epoch(359, batch_size, world, accumulation) * accumulation


@each_once(world=[1, 2], workers=[0, 2], first_step=[1, 3, 4])
def test_an_epoch_is_entered_at_any_step(digits, held_out, world, workers, first_step):
    """Both kinds of feeds; a stream decodes no image of the steps before."""
    cut = {"batch_size": 100, "data_seed": 5, "epoch": 2, "accumulation": 2, "world": world}
    transform, decoded = create_transform((3, 16, 16), is_training=True, auto_augment="rand-m9"), []

    def counted(image):
        decoded.append(image)
        return transform(image)

    for rank in range(world):
        here = {**cut, "rank": rank}
        memory = [
            list(batches(held_out, flip=True, **here, **PLAIN_PIXELS, first_step=step)) for step in (0, first_step)
        ]
        streams = [list(stream(digits[1], transform, **here, workers=workers, first_step=s)) for s in (0, first_step)]
        for whole, rest in (memory, streams):
            assert len(rest) == 2 * (4 - first_step)
            for ours, theirs in zip(rest, whole[2 * first_step :], strict=True):
                assert torch.equal(ours.images, theirs.images)
                assert torch.equal(ours.labels, theirs.labels)
                assert ours.global_count == theirs.global_count
        decoded.clear()
        shown = sum(len(batch.labels) for batch in stream(digits[1], counted, **here, first_step=first_step))
        assert len(decoded) == shown


@each_once(world=[1, 2, 3], workers=[0, 2])
def test_a_stream_in_order_has_the_shares_of_memory(digits, held_out, world, workers):
    for rank in range(world):
        known = eval_batches(held_out, batch_size=100, mean=[0] * 3, std=[1] * 3, rank=rank, world=world)
        shown = stream(digits[1], T.pil_to_tensor, batch_size=100, epoch=None, rank=rank, world=world, workers=workers)
        for ours, theirs in zip(shown, known, strict=True):
            assert torch.equal(ours.images, (theirs.images * 255).round())
            assert torch.equal(ours.labels, theirs.labels)
            assert ours.global_count == theirs.global_count


def augmented(split, workers=0, world=1, accumulation=1, epoch=0, data_seed=5):
    """Return {row shown: its augmented image} of an epoch, over all processes; rows by their place in the epoch."""
    transform = create_transform((3, 16, 16), is_training=True, auto_augment="rand-m9", normalize=False)
    cut = {"batch_size": 60, "data_seed": data_seed, "epoch": epoch, "accumulation": accumulation, "world": world}
    order = epoch_order(len(split), data_seed, epoch)[0]
    ranks = [list(stream(split, transform, rank=rank, workers=workers, **cut)) for rank in range(world)]
    images, _ = joined(ranks)
    return dict(zip(order.tolist(), images, strict=False))


def test_augmentation_follows_from_the_seed_the_epoch_and_the_image(digits):
    """No number of processes, workers or accumulation steps changes it; another epoch, data seed or image does."""
    few = replace(digits[1], dataset=digits[1].dataset.select([0] * 120))  # one image: what differs was drawn
    first = augmented(few)
    assert len(first) == 120
    for other in (augmented(few), augmented(few, workers=2), augmented(few, workers=1, world=2, accumulation=2)):
        assert other.keys() == first.keys()
        assert all(torch.equal(image, other[row]) for row, image in first.items())
    assert len({image.numpy().tobytes() for image in first.values()}) > 110
    for other in (augmented(few, epoch=1), augmented(few, data_seed=6)):
        assert sum(torch.equal(image, other[row]) for row, image in first.items()) < 5


def test_augmentation_leaves_the_global_generators_alone(digits):
    def state():
        return random.getstate(), torch.get_rng_state().tolist(), repr(np.random.get_state())

    before = state()
    assert augmented(digits[1])
    assert state() == before


def test_a_stream_survives_pickling(digits):
    transform = create_transform((3, 16, 16), is_training=True)
    items = data._Items(digits[1], transform, 3, (5, 0))
    assert torch.equal(pickle.loads(pickle.dumps(items))[3], items[3])


def test_string_labels_are_classes_in_sorted_order(digits, folder, refused):
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

    def named(rows):
        names = [words[label] for label in rows["label"]]
        return rows.remove_columns("label").add_column("label", names)

    train, test = load_splits(folder(train=named(digits[0].dataset), test=named(digits[1].dataset)))
    assert train.label_names == test.label_names == tuple(sorted(words))
    decoded = decode(test, size=8)
    assert [decoded.label_names[i] for i in decoded.labels] == [words[i] for i in digits[1].dataset["label"]]
    streamed = torch.cat([b.labels for b in stream(test, T.pil_to_tensor, batch_size=100, epoch=None)])
    assert torch.equal(streamed, decoded.labels)
    few = named(digits[0].dataset.filter(lambda row: row["label"] not in (3, 5)))
    with refused(DataError, "five", "three"):
        load_splits(folder(train=few, test=named(digits[1].dataset)))
    missing = named(digits[0].dataset).map(lambda row, i: {"label": row["label"] if i else None}, with_indices=True)
    with refused(DataError, "-1: none"):
        load_splits(folder(train=missing, test=named(digits[1].dataset)))


def test_a_csv_of_metadata_names_the_classes(digits, tmp_path):
    for split, rows in zip(("train", "test"), digits, strict=True):
        (tmp_path / split).mkdir()
        lines = ["file_name,label,checked,page"]
        for i in range(12):
            rows.dataset[i]["image"].save(tmp_path / split / f"{i}.png")
            lines.append(f"{i}.png,{'odd' if rows.dataset[i]['label'] % 2 else 'even'},{i % 2 == 0},{i}")
        (tmp_path / split / "metadata.csv").write_text("\n".join(lines) + "\n")
    train, test = load_splits(str(tmp_path))
    assert train.label_names == ("even", "odd")
    assert decode(test, size=8).labels.tolist() == [label % 2 for label in digits[1].dataset["label"][:12]]
    checked, _ = load_splits(str(tmp_path), label_column="checked")
    assert checked.label_names == ("False", "True")
    assert decode(checked, size=8).labels.tolist() == [1, 0] * 6


@pytest.mark.parametrize("kind", ["class labels", "strings"])
def test_classes_are_numbered_by_name(digits, refused, kind):
    names = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay"]
    rows = digits[1].dataset.cast_column("label", datasets.ClassLabel(names=names))
    codes = None
    if kind == "strings":
        rows = rows.remove_columns("label").add_column("label", [names[i] for i in rows["label"]])
        codes = {name: label for label, name in enumerate(names)}
    split = Split(rows, "image", "label", tuple(names), "test", codes)
    other = names[::-1]
    again = numbered(split, other)
    assert again.label_names == tuple(other)
    labels = decode(again, size=8).labels
    assert torch.equal(labels, 9 - digits[1].dataset.with_format("torch")["label"][:])
    assert torch.equal(torch.cat([b.labels for b in stream(again, T.pil_to_tensor, batch_size=9, epoch=None)]), labels)
    assert torch.equal(decode(numbered(again, names), size=8).labels, 9 - labels), "and back"
    assert numbered(split, names) is split
    with refused(DataError, "missing in the data: ['yak']", "unknown to the network: ['jay']"):
        numbered(split, [*names[:-1], "yak"])
    with refused(DataError, "missing in the data: []", "unknown to the network: ['jay']"):
        numbered(split, names[:-1])
    with refused(DataError, "missing in the data: []", "unknown to the network: ['bee']"):
        numbered(split, ["ant", "ant", *names[2:]])


def test_plain_integers_have_no_names_to_go_by(digits):
    rows = digits[1].dataset.cast_column("label", datasets.Value("int64"))
    split = Split(rows, "image", "label", tuple("0123456789"), "test")
    assert numbered(split, [f"class {i}" for i in range(10)]) is split


def picture_folder(digits, where, *splits, classes=("cat", "dog"), count=10):
    for split in splits:
        for name in classes:
            (where / split / name).mkdir(parents=True)
            for i in range(count):
                digits[0].dataset[i]["image"].save(where / split / name / f"{i}.png")
    return str(where)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_split_is_tested_on_where_there_is_no_test_split(digits, tmp_path, name):
    path = picture_folder(digits, tmp_path, "train", name)
    for asked in ("test", name, "validation"):
        train, test = load_splits(path, test_split=asked)
        assert (len(train), len(test), test.name) == (20, 20, "validation")
        assert test.label_names == ("cat", "dog")


def test_the_test_split_goes_before_a_validation_split(digits, tmp_path):
    path = picture_folder(digits, tmp_path, "train", "val", "test")
    assert load_splits(path)[1].name == "test"
    assert load_splits(path, test_split="val")[1].name == "validation"


def test_a_fifth_is_held_out_of_a_folder_of_classes_alone(digits, tmp_path, refused):
    path = picture_folder(digits, tmp_path, "")
    train, test = load_splits(path)
    assert (len(train), len(test)) == (16, 4)
    assert test.name == "4 held out of train"
    assert train.label_names == test.label_names == ("cat", "dog")
    paths = [
        {cell["path"] for cell in s.dataset.cast_column("image", datasets.Image(decode=False))["image"]}
        for s in (train, test)
    ]
    assert len(paths[0] | paths[1]) == 20
    assert not paths[0] & paths[1]
    assert load_splits(path)[1].dataset["image"][0].filename == test.dataset["image"][0].filename, "the same each time"
    assert len(load_splits(path, held_out=7)[1]) == 7
    for asked in ("val", "page"):
        with refused(DataError, f"lacks ['{asked}']", "splits ['train']"):
            load_splits(path, test_split=asked)


@pytest.mark.parametrize("splits", [("train", "test"), ("",)])
def test_folders_of_one_class_have_no_labels_and_are_told_so(digits, tmp_path, splits, refused):
    """`datasets` makes no label column of one folder's name."""
    path = picture_folder(digits, tmp_path, *splits, classes=("cat",))
    with refused(DataError, "a folder of one class alone", "train/cat, train/dog"):
        load_splits(path)


def test_one_class_is_nothing_to_train(digits, folder, refused):
    rows = digits[1].dataset.remove_columns("label").add_column("label", ["cat"] * 359)
    train, _ = load_splits(folder(train=rows))
    with refused(DataError, "one class: cat"):
        check_training(train)


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
