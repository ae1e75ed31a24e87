"""What a step on a GPU would move and hold: counted by hand, and against the peaks that were measured on a CPU."""

import shutil

import pytest
import torch
from conftest import script
from torch.nn import functional as F

from bn_affine_adapters.lean.backends import gpu

roofline = script("benchmarks/roofline")
measured = script("benchmarks/lean").read(roofline.HERE / "lean.jsonl")
H200 = (4.8e12, 989e12)
needs_triton = pytest.mark.skipif(not gpu.load(), reason="needs Triton's kernels: the log says why not")


def counted(run, bandwidth=1e9, rate=1e12):
    with roofline.Count(bandwidth, rate) as count:
        kept = run()
    del kept
    return count.found


def test_an_operator_moves_its_inputs_and_its_outputs():
    x, y = torch.randn(2, 64, 8, 8), torch.randn(2, 64, 8, 8)
    size = x.nbytes
    for run, moved in {
        lambda: x + y: 3 * size,
        lambda: x.relu(): 2 * size,
        lambda: x.add_(y): 3 * size,
        lambda: x.view(-1): 0,
        lambda: torch.empty_like(x): 0,
        lambda: x + y[:1, :1, :1, :1].expand_as(x): 2 * size + y.nbytes,  # at most what there is
        lambda: x + torch.ones(1).expand_as(x): 4 + 4 + 2 * size,  # a number is written, and read for all
        lambda: F.batch_norm(x, None, None, training=True): 3 * size + 2 * 64 * 4,  # and mean and deviation
    }.items():
        assert counted(run).moved == moved


@pytest.mark.parametrize(("for_input", "for_weight"), [(True, True), (True, False), (False, True)])
def test_each_gradient_of_a_convolution_reads_what_it_needs(for_input, for_weight):
    x = torch.randn(2, 4, 8, 8, requires_grad=for_input)
    weight = torch.randn(6, 4, 3, 3, requires_grad=for_weight)
    y = F.conv2d(x, weight, padding=1)
    dy = torch.randn_like(y)
    found = counted(lambda: torch.autograd.grad(y, [t for t in (x, weight) if t.requires_grad], dy))
    moved = (dy.nbytes + weight.nbytes + x.nbytes) * for_input + (dy.nbytes + x.nbytes + weight.nbytes) * for_weight
    assert found.moved == moved
    assert found.operations == 2 * y.numel() * 4 * 9 * (for_input + for_weight)


def test_time_is_that_of_bytes_or_of_operations_whichever_is_longer():
    a, b = torch.randn(100, 100), torch.randn(100, 100)
    assert counted(lambda: a @ b, 1e9, 1e12).seconds == pytest.approx(3 * 40_000 / 1e9)
    assert counted(lambda: a @ b, 1e15, 1e9).seconds == pytest.approx(2 * 100**3 / 1e9)


def test_the_peak_is_of_what_is_referred_to_at_once():
    def run():
        first = torch.ones(1000)  # 4,000 bytes are 4,096 of the allocator's
        second = first * 2
        del first
        return second * 2

    assert counted(run).peak == 2 * 4096


@needs_triton
@pytest.mark.parametrize("way", roofline.WAYS)
def test_peaks_are_those_that_were_measured_on_a_cpu(way):
    """In float32, of a line that `lean.py` wrote; the network itself has a hundredth of it."""
    line = next(x for x in measured if (x["network"], x["device"]) == ("cifar_resnet56", "cpu"))
    step = roofline.cost(line["network"], way, line["batch"], line["size"], "float32", *H200)
    assert step.peak == pytest.approx(line["ways"][way]["peak"], rel=0.2 if way == "smallest" else 0.05)
    assert step.operations == line["ways"][way]["operations"]


@needs_triton
def test_the_script_prints_a_row_a_way_and_writes_the_page(monkeypatch, tmp_path, capsys):
    page = tmp_path / "performance.md"
    shutil.copy(roofline.PAGE, page)
    monkeypatch.setattr(roofline, "PAGE", page)
    roofline.main(["--networks", "cifar_resnet14", "--images", "64x32", "--write"])
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:3] for row in rows] == [["cifar_resnet14", "64 x 32 px", way] for way in roofline.WAYS]
    times, peaks = ([float(row[i]) for row in rows] for i in (7, 9))
    assert times[0] == peaks[0] == 1
    assert times[2] == times[3] < times[4] < times[1] < 1  # in bfloat16 there is nothing to round
    assert peaks[4] < peaks[3] == peaks[2] < 0.7 < peaks[1]
    assert "| cifar_resnet14 | 64 x 32 px | smallest |" in page.read_text()
    assert gpu.DEVICE == "cuda"  # only in there


# The second's operators are in the first, but attention.
PAGE_ROWS = [("cifar_resnet56", "exact"), pytest.param("vit_small_patch16_224", "smallest", marks=pytest.mark.slow)]


@needs_triton
@pytest.mark.parametrize(("name", "way"), PAGE_ROWS)
def test_the_page_has_what_the_script_computes(name, way):
    batch, size = roofline.ABOUT["networks"][name]["cuda"]
    step = roofline.cost(name, way, batch, size, "bf16", *H200)
    lines = roofline.PAGE.read_text().split("<!-- begin roofline -->")[1].splitlines()
    (row,) = [line.split("|") for line in lines if line.startswith(f"| {name} | {batch} x {size} px | {way} |")]
    found = [float(row[i]) for i in (5, 7, 9)]  # not the operations: older PyTorch does not know those of attention
    computed = [step.moved / 1e9, step.seconds * 1e3, step.peak / 1e6]
    assert found == pytest.approx(computed, rel=0.02)
