"""A folder from a stranger is regular files of bounded size, at every door by which it comes in."""

import json
import os
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from conftest import each_once
from doors import DOORS, REPO, WRITING, card, command, inspect
from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from bn_affine_adapters import BNAdapterError, BNOnlyConfig, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.adapter.tensors import digest_of
from bn_affine_adapters.errors import AdapterFileError, AdapterTensorError, ConfigError, TooLargeError
from bn_affine_adapters.settings import MAX_TENSORS
from bn_affine_adapters.sharing.card import write_card
from bn_affine_adapters.sharing.contents import BLOCK, read_tensors
from bn_affine_adapters.sharing.handwritten import MAX_METADATA
from bn_affine_adapters.sharing.hub import push_folder
from bn_affine_adapters.sharing.results import MAX_LINES, MAX_SETS

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc/self")
BOTH = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
OTHERS = ("README.md", "results.json", "gamma.png")  # what a card and a push read, or write, too
SECRET = "a secret outside the folder"


def network():
    return timm.create_model("test_resnet", num_classes=3)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest")
    get_bn_only_model(network(), BNOnlyConfig(seed=0)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(honest, tmp_path):
    return shutil.copytree(honest, tmp_path / "adapter")


@pytest.fixture
def outside(honest, tmp_path):
    """A folder beside the adapter's with files of the same names, which have to stay as they are."""
    where = shutil.copytree(honest, tmp_path / "outside")
    for name in OTHERS:
        (where / name).write_text("[]" if name == "results.json" else SECRET)
    before = {path: path.read_bytes() for path in where.iterdir()}
    yield where
    assert {path: path.read_bytes() for path in where.iterdir()} == before


@pytest.fixture
def enter(hub, alice):
    """Enter by a door, and hold what it does against bounds: bytes of memory, and seconds of processor time."""

    def enter(door, folder, memory=400_000_000, seconds=5.0):
        with bounded(memory, seconds):
            return door(folder, network, alice)

    return enter


@contextmanager
def bounded(memory, seconds):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = kilobytes("VmRSS"), time.process_time()
    yield
    assert time.process_time() - start < seconds
    assert 1024 * (kilobytes("VmHWM") - before) < memory


def kilobytes(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def pairs(*, also=(), doors=DOORS):
    """Return (door, file that it reads) by a name; of PEFT's own reading of the configuration see the threat model."""
    found = {f"{door}-{name}": (doors[door], name) for door in doors for name in BOTH}
    found |= {f"{door}-{name}": (doors[door], name) for door in sorted(WRITING) for name in also}
    return {key: pair for key, pair in found.items() if key != f"peft-{CONFIG_NAME}"}


@each_once(door=DOORS)
def test_the_honest_adapter_comes_in_at_every_door(door, folder, enter):
    enter(door, folder, seconds=20)


LINKS = {
    "outside": lambda path, outside: path.symlink_to(outside / path.name),
    "outside, from inside": lambda path, outside: path.symlink_to(f"../outside/{path.name}"),
    "by way of a folder": lambda path, outside: (
        (path.parent / "way").symlink_to(outside),
        path.symlink_to(f"way/{path.name}"),
    ),
    "nowhere": lambda path, outside: path.symlink_to(outside / "not there"),
    "to itself": lambda path, outside: path.symlink_to(path.name),
    "to a folder": lambda path, outside: path.symlink_to("."),
    "to a device": lambda path, outside: path.symlink_to("/dev/zero"),
    "a folder": lambda path, outside: path.mkdir(),
    "a FIFO": lambda path, outside: os.mkfifo(path),
    "to a FIFO": lambda path, outside: (os.mkfifo(path.parent / "pipe"), path.symlink_to("pipe")),
}


@each_once(kind=LINKS, pair=pairs(also=OTHERS[:2]))
def test_only_regular_files_inside_the_folder_are_read(kind, pair, folder, outside, enter, refused):
    door, name = pair
    (folder / name).unlink(missing_ok=True)
    kind(folder / name, outside)
    with refused(AdapterFileError, f"{name} cannot be used"):
        enter(door, folder)


@pytest.mark.parametrize("kind", ["outside", "nowhere", "to itself", "a FIFO"])
def test_a_link_where_the_card_is_written_is_replaced(kind, folder, outside, enter):
    LINKS[kind](folder / "gamma.png", outside)
    (folder / ".saving-1-README.md").symlink_to(outside / "README.md")
    enter(card, folder, seconds=20)
    assert (folder / "gamma.png").read_bytes()[:4] == b"\x89PNG"
    assert not (folder / "gamma.png").is_symlink()


def test_results_are_written_into_no_folder_elsewhere(folder, outside, refused):
    (folder / ".eval_results").symlink_to(outside)
    with refused(AdapterFileError, ".eval_results cannot be used"):
        card_with(folder, [{"dataset": "me/x", "top1": 50.0}])
    (folder / ".eval_results").unlink()
    (folder / ".eval_results").write_text("")
    with refused(AdapterFileError, ".eval_results cannot be used"):
        card_with(folder, [{"dataset": "me/x", "top1": 50.0}])


def test_a_picture_is_pushed_only_if_it_lies_in_the_folder(folder, outside, hub, alice, refused):
    card(folder, network, alice)
    (folder / "gamma.png").unlink()
    (folder / "gamma.png").symlink_to(outside / "README.md")
    with refused(AdapterFileError, "gamma.png cannot be used"):
        push_folder(folder, REPO, token=alice)


def test_a_subfolder_is_no_link_to_elsewhere(folder, outside, refused):
    (folder / "sub").symlink_to(outside)
    with refused(AdapterFileError, "inside its repository", str(outside)):
        load_bn_only_model(folder, subfolder="sub")


@each_once(door=DOORS)
def test_links_inside_the_folder_and_those_of_the_cache_are_followed(door, folder, hub, alice, tmp_path, enter):
    (folder / "files").mkdir()
    for name in BOTH:
        (folder / name).rename(folder / "files" / name)
        (folder / name).symlink_to(f"files/{name}")
    enter(door, folder, seconds=20)
    push_folder(folder, "alice/y", token=alice, card=False)
    snapshot = Path(snapshot_download("alice/y", token=alice, cache_dir=tmp_path / "cache"))
    assert all((snapshot / name).is_symlink() for name in BOTH)
    enter(door, snapshot, seconds=20)
    (snapshot / SAFETENSORS_WEIGHTS_NAME).unlink()
    (snapshot / SAFETENSORS_WEIGHTS_NAME).symlink_to(folder / "files" / SAFETENSORS_WEIGHTS_NAME)
    with pytest.raises(AdapterFileError):
        enter(door, snapshot)


# -- what is too large


def enlarge(path, size):
    """Make a file so large; its end takes no place on the disk."""
    path.touch()
    os.truncate(path, size)


@each_once(pair=pairs(also=OTHERS[:2]))
def test_a_file_of_gigabytes_is_refused_unread(pair, folder, enter):
    door, name = pair
    enlarge(folder / name, 3_000_000_000)
    with pytest.raises((TooLargeError, AdapterFileError)):
        enter(door, folder, memory=100_000_000)


def claim(folder, values):
    """Let a tensor more claim so many values, as many as the file then has."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, end = json.loads(content[8 : 8 + size]), len(content) - 8 - size
    header["bn1.bn_only_layers.more"] = {"dtype": "F32", "shape": [values], "data_offsets": [end, end + 4 * values]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    enlarge(path, 8 + len(text) + end + 4 * values)


@each_once(door=DOORS)
def test_a_sparse_tensor_of_two_gigabytes_is_refused_unread(door, folder, enter):
    claim(folder, 2**29)
    with pytest.raises((TooLargeError, AdapterTensorError)):
        enter(door, folder, memory=100_000_000)


def test_values_are_read_a_block_at_a_time(folder, enter):
    """The bound on a file is larger than what one door takes of the memory."""
    claim(folder, 2**26)
    with bounded(100_000_000, 10):
        found = read_tensors(folder)["bn1.bn_only_layers.more"]
        assert (found.size, found.bytes) == (2**26, 2**28)
        assert max(block.size for block in found.blocks()) == BLOCK
        with pytest.raises(AdapterTensorError):  # it is another adapter's
            enter(inspect, folder)


def test_a_table_of_differences_is_bounded(folder, enter, tmp_path):
    """20,000 names, each of another layer and of another tensor, are no table of 20,000 rows and columns."""
    other = shutil.copytree(folder, tmp_path / "other")
    path = other / SAFETENSORS_WEIGHTS_NAME
    count = MAX_TENSORS - 2_000
    save_file({f"{i}.bn_only_layers.{i}": torch.zeros(1) for i in range(count)}, path)
    edit(other, tensors_digest=digest_of({f"{i}.bn_only_layers.{i}": torch.zeros(1) for i in range(count)}))
    with bounded(400_000_000, 20):
        assert command("diff", folder, other) == 1


# -- cards and results


def write_results(folder, lines):
    (folder / "results.json").write_text(json.dumps(lines))


def edit(folder, **values):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def card_with(folder, lines):
    write_card(folder, REPO, results=lines)


def front(text):
    return f"---\n{text}\n---\n\nText.\n"


CARDS = {
    "aliases": front("a: &a [x, x]\n" + "\n".join(f"{b}: &{b} [*{a}, *{a}]" for a, b in pairwise("abcdefghi"))),
    "a circle": front("a: &a [*a]"),
    "deep": front("a: " + "[" * 20_000 + "]" * 20_000),
    "digits": front("a: 0x" + "f" * 20_000),
    "long": front("a: [" + "x, " * MAX_METADATA + "]"),
    "not UTF-8": b"\xff" * 100,
    "a list": front("- x"),
    "a tag": front("a: !!python/object/apply:os.system [x]"),
    "a key": front("? [x]\n: x"),
}


@each_once(text=CARDS, door={name: DOORS[name] for name in sorted(WRITING)})
def test_a_card_cannot_take_the_memory(text, door, folder, enter):
    if door is DOORS["push"]:  # reads the folder's card when the Hub has one
        enter(door, folder, seconds=20)
    (folder / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ConfigError, AdapterFileError)):
        enter(door, folder)


SLOW = {
    "items": front("tags:\n" + "- x{}\n" * 5000).format(*range(5000)),
    "begins": "<!-- bn-adapters:begin -->\n" * 40_000,
    "begins on a line": "<!-- bn-adapters:begin -->" * 40_000,
    "marks": "<!-- bn-adapters:begin -->\n<!-- bn-adapters:end x -->\n" * 20_000 + "x",
    "lines": "\n" * 1_000_000,
    "dashes": "---\n" + "\n---  " * 100_000,
}


@pytest.mark.parametrize("name", SLOW)
def test_a_card_cannot_take_the_time(name, folder, enter):
    (folder / "README.md").write_text(SLOW[name])
    with suppress(BNAdapterError):
        enter(card, folder)


RESULTS = {
    "lines": [{"dataset": "a/x", "top1": 50.0, "recipe": {"seed": i}} for i in range(MAX_LINES + 1)],
    "data sets": [{"dataset": f"a/{i}", "top1": 50.0} for i in range(MAX_SETS + 1)],
    "bytes": [{"dataset": "x", "top1": 50.0, "command": "/x " * 700_000}],
    "as many as may be": [
        {"dataset": f"a/{i % MAX_SETS}", "top1": 50.0, "recipe": {"seed": i}} for i in range(MAX_LINES)
    ],
    "paths": [{"dataset": "x", "top1": 50.0, "command": " ".join(f"/{i}" for i in range(200_000))}],
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_bounded(name, folder, enter, refused):
    write_results(folder, RESULTS[name])
    kinds = {"lines": ConfigError, "data sets": ConfigError, "bytes": TooLargeError}
    if name not in kinds:
        enter(card, folder, seconds=10)
        return
    with refused(kinds[name]):
        enter(card, folder)


def test_as_many_results_are_written_as_are_read(folder, refused):
    with refused(ConfigError, f"{MAX_LINES + 1:,} lines"):
        card_with(folder, RESULTS["lines"])
    assert not (folder / "results.json").exists()
