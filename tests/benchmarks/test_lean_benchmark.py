"""The benchmarks of lean training and of the data path: what they measure, how they go on, what they write."""

import gc
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from conftest import script
from torch import nn

from bn_affine_adapters.lean import saved_bytes
from bn_affine_adapters.study.costs import largest, operations, peak_memory, unsaved_buffers
from bn_affine_adapters.training.data import TensorData, batches
from bn_affine_adapters.training.feed import DataOptions

lean = script("benchmarks/lean")
PAGE = lean.DOCS / "performance.md"
WAYS = ["full", "plain", "peft", "checkpointed", "exact", "rounded", "smallest"]
SMALL = ["--networks", "cifar_resnet14", "--images", "4x16", "--precision", "float32", "--rounds", "1", "--steps", "1"]
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory of a CPU is read from /proc")


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """What the script appends of a small network, with invented peaks in the place of those of other processes."""
    file = tmp_path_factory.mktemp("lean") / "lines.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            lean, "peaks_apart", lambda job, ways: [[(2, 10**9, 2 * 10**9), (4, 10**9, 3 * 10**9)]] * len(ways)
        )
        patch.setattr(lean, "peaks", lambda job, way: [(4, 10**9, 3 * 10**9)])
        patch.setattr(lean, "largest", lambda fits: 6)
        lean.main([*SMALL, "--out", str(file)])
    (text,) = file.read_text().splitlines()
    return json.loads(text)


def section(text, name="lean"):
    return text.split(f"<!-- begin {name} -->\n")[1].split(f"<!-- end {name} -->")[0].strip()


def copied(folder):
    """A copy of the page to write into."""
    shutil.copy(PAGE, folder)
    return folder / PAGE.name


# What a step costs


def test_operations_are_those_of_forward_and_of_each_gradient_in_groups_too():
    images = torch.randn(2, 4, 8, 8, requires_grad=True)
    for groups in (1, 4):
        conv = nn.Conv2d(4, 8, 3, padding=1, groups=groups)
        forward = 2 * (2 * 8 * 8 * 8) * (4 // groups * 9)
        assert operations(lambda conv=conv: conv(images).sum().backward()) == 3 * forward
        conv.weight.requires_grad_(False)
        assert operations(lambda conv=conv: conv(images).sum().backward()) == 2 * forward
        assert operations(lambda conv=conv: conv(images.detach())) == forward


def test_counting_saved_bytes_leaves_no_tensor_behind():
    def alive():
        gc.collect()
        return sum(type(found) is torch.Tensor for found in gc.get_objects())

    network, images = timm.create_model("cifar_resnet14"), torch.randn(2, 3, 8, 8)
    before = alive()
    counted = saved_bytes(network, lambda: network(images).detach())[1]
    assert counted > 0
    assert alive() == before


def test_copies_are_the_buffers_that_are_not_saved_each_counted_once():
    model = nn.Sequential(nn.BatchNorm1d(3))
    assert unsaved_buffers(model) == 0
    model[0].register_buffer("flipped", torch.zeros(5), persistent=False)
    model.append(model[0])
    assert unsaved_buffers(model) == 20


@linux
def test_the_peak_of_a_step_is_that_of_what_it_holds_together():
    def step(count):
        return [torch.ones(10**7) for _ in range(count)]

    (before, one), (_, three) = peak_memory(lambda: step(1)), peak_memory(lambda: step(3))
    assert one - before > 3e7
    assert three - one == pytest.approx(8e7, rel=0.2)


@pytest.mark.parametrize("limit", [0, 1, 21, 5000])
def test_the_largest_batch_is_found_to_three_percent(limit):
    tried = []
    found = largest(lambda batch: tried.append(batch) or batch <= limit)
    assert found <= limit <= found * 1.04
    assert len(tried) < 24


def test_on_a_cpu_the_largest_batch_lies_on_a_line():
    points = [(2, 0, 1_200), (4, 0, 1_400)]
    assert lean.on_a_line(points, 1_400) == 4
    assert lean.on_a_line(points, 2_000) == 10
    assert lean.on_a_line(points, 900) == 0


# A line


def test_a_line_says_everything_of_each_way(line):
    assert list(line["ways"]) == WAYS
    for way, found in line["ways"].items():
        assert set(found) == {"before", "peak", "largest", "saved", "copies", "operations", "seconds"}, way
        assert len(found["seconds"]) == line["rounds"] == 1
        assert len(found["largest"]) == len(lean.LIMITS)
    assert (line["network"], line["batch"], line["size"]) == ("cifar_resnet14", 4, 16)
    assert set(line["versions"]) == {"torch", "timm", "peft"}


def test_saved_bytes_fall_with_the_level_and_nothing_is_copied(line):
    saved = {way: lean.ratio(line, way, "saved") for way in WAYS}
    assert 0.95 < saved["plain"] == saved["peft"] < saved["full"] == 1
    assert 0.05 < saved["smallest"] < saved["rounded"] < 0.3 < saved["exact"] < 0.55
    assert saved["checkpointed"] < 0.4
    assert all(found["copies"] == 0 for found in line["ways"].values())


def test_operations_rise_only_where_something_is_computed_again(line):
    spent = {way: lean.ratio(line, way, "operations") for way in WAYS}
    assert 0.6 < spent["plain"] < 0.7
    assert spent["plain"] == spent["peft"] == spent["exact"] == spent["rounded"]
    assert spent["plain"] < spent["smallest"] < spent["checkpointed"] < 1.01


def test_every_way_but_full_trains_gamma_and_beta_alone():
    job = lean.Job("cifar_resnet14", 4, 16, "float32", 1, 1, 1, None)
    trained = Counter()
    for way in WAYS:
        model = lean.Training(job, way).model
        trained[sum(p.numel() for p in model.parameters() if p.requires_grad)] += 1
    whole = sum(p.numel() for p in timm.create_model("cifar_resnet14").parameters())
    assert trained.pop(whole) == 1
    assert list(trained.values()) == [len(WAYS) - 1]


def test_ratios_of_times_are_of_one_round_and_missing_ones_are_none():
    line = {"ways": {"full": {"seconds": [1.0, 10.0, 2.0]}, "exact": {"seconds": [0.5, 9.0, 1.4]}}}
    assert lean.ratio(line, "exact", "seconds") == 0.7
    assert lean.ratio(line, "exact", "seconds", "plain") is None
    assert lean.ratio(line, "exact", "peak") is None


@linux
def test_peaks_come_from_a_process_a_way():
    job = lean.Job("cifar_resnet14", 32, 16, "float32", 1, 1, 1, None)
    found = lean.peaks_apart(job, ["full", "exact"])
    assert [[batch for batch, _, _ in points] for points in found] == [[16, 32]] * 2
    full, exact = ([high - before for _, before, high in points] for points in found)
    assert full[0] < full[1]
    assert exact[1] < 0.8 * full[1]


def test_what_is_in_the_file_is_not_measured_again(line, tmp_path, monkeypatch, capsys):
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps(line) + "\n")
    monkeypatch.setattr(lean, "measure", lambda job, ways: {**line, "rounds": job.rounds})
    lean.main([*SMALL, "--out", str(file)])
    assert file.read_text() == json.dumps(line) + "\n"
    lean.main([*SMALL, "--rounds", "2", "--out", str(file)])
    assert [json.loads(text)["rounds"] for text in file.read_text().splitlines()] == [1, 2]
    assert "| cifar_resnet14 | 4 x 16 px | exact |" in capsys.readouterr().out
    assert [found["rounds"] for found in lean.read(file)] == [2]


# The page


def test_the_page_has_a_row_for_each_way_and_a_figure_beside_it(line, tmp_path):
    page = copied(tmp_path)
    (tmp_path / "figures").mkdir()
    lean.write([line], tmp_path)
    text = section(page.read_text())
    for row in lean.rows(line):
        assert f"| {' | '.join(row)} |" in text
    for way in WAYS:
        assert f"\n- {way}: " in text
        assert f"| cifar_resnet14 | {way} | " in text
    assert f"{line['machine']}, {line['threads']} thread" in text
    assert f"torch {torch.__version__}" in text
    assert ("On a GPU: not yet measured." in text) == (line["device"] == "cpu")
    assert "<svg" in (tmp_path / "figures" / "lean.svg").read_text()
    before, after = PAGE.read_text(), page.read_text()
    assert before.replace(section(before), "") == after.replace(section(after), "")


def test_the_page_in_the_documentation_is_that_of_the_lines_beside_the_script():
    lines = lean.read(lean.LINES)
    assert section(PAGE.read_text()) == lean.page(lines).strip()
    assert (lean.DOCS / "figures" / "lean.svg").exists() == bool(lines)


def invented(network, device, saved, seconds):
    batch, size = lean.NETWORKS[network][device]
    ways = {way: {"saved": saved[way], "seconds": [seconds[way]]} for way in saved}
    precision = lean.ABOUT["precision"][device]
    return {"network": network, "device": device, "batch": batch, "size": size, "precision": precision, "ways": ways}


def test_verdicts_follow_from_the_bounds_and_from_lines_of_the_right_images_alone():
    saved = {"full": 100, "plain": 100, "exact": 52, "rounded": 28, "smallest": 10}
    seconds = {"full": 10.0, "plain": 7.0, "exact": 7.2, "rounded": 7.3, "smallest": 7.3}
    line = invented("cifar_resnet56", "cpu", saved, seconds)
    judged = {(r[0], r[1], r[2], r[3]): (r[5], r[6]) for r in lean.verdicts([line], "cpu")}
    assert judged["cifar_resnet56", "exact", "saved bytes", "full"] == ("0.520", "yes")
    assert judged["cifar_resnet56", "rounded", "saved bytes", "full"] == ("0.280", "no")
    assert judged["cifar_resnet56", "rounded", "time", "full"] == ("0.730", "no")
    assert judged["cifar_resnet56", "exact", "time", "plain"] == ("1.029", "yes")
    assert judged["cifar_resnet56", "rounded", "time", "plain"] == ("1.043", "no")
    assert judged["resnet50", "exact", "time", "full"] == ("-", "not measured")
    for other in ({"batch": 4}, {"precision": "bf16"}, {"device": "cuda"}):
        assert {r[6] for r in lean.verdicts([line | other], "cpu")} == {"not measured"}, other
    assert len(lean.verdicts([], "cuda")) == 5


def test_the_targets_name_what_is_measured():
    for device, targets in lean.ABOUT["targets"].items():
        for target in targets:
            assert target["network"] in (None, *lean.NETWORKS)
            assert target["measure"] in lean.ABOUT["measures"]
            assert {*target["bounds"], target["to"]} <= {*lean.WAYS, *lean.COMPILED}
        assert targets, device
    assert list(lean.ABOUT["ways"]) == list(lean.WAYS) == WAYS


# The data path


def test_both_sides_of_the_data_path_show_all_images_the_same_way(monkeypatch):
    feed = script("benchmarks/feed")
    monkeypatch.setattr(feed, "REPEATS", 1)
    result = feed.compare(size=8, batch=128, workers=[0], rounds=1)
    rates = result["images_per_second"]
    assert set(rates) == {"feed", "0 workers"}
    assert result["over_feed"]["0 workers"] == pytest.approx(rates["0 workers"] / rates["feed"], abs=0.01)
    assert f"| feed | {rates['feed']} | 1.0 |" in feed.section(result)


def test_the_loader_of_the_data_path_normalises_as_the_feed_does():
    options = DataOptions(image_size=8)
    data = TensorData(torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"))
    how = {"flip": False, "crop_padding": 0, "mean": options.mean, "std": options.std}
    (expected,) = batches(data, batch_size=2, data_seed=0, epoch=0, **how)
    found = {int(label): image for image, label in script("benchmarks/feed").Decoded(data, options)}
    for image, label in zip(expected.images, expected.labels, strict=True):
        either = [(found[int(label)] - shown).abs().max() for shown in (image, image.flip(-1))]
        assert min(either) < 1e-5 < max(either)
