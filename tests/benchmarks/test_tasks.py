"""The page on tasks is written from the lines of `bn-adapters compare`, and says only what they say."""

from conftest import script

from bn_affine_adapters.training.compare import METHODS

tasks = script("benchmarks/tasks")


def line(method, task, accuracy, size=1000, held_out=0, lr=0.01, largest=20.0):
    """A line as `compare` writes it, of what the page reads."""
    recipe = {"model": "net", "held_out": held_out, "lr": lr, "image_size": 96, "epochs": 20}
    metrics = [{"accuracy": accuracy, "balanced accuracy": accuracy - 1, "largest class": largest}]
    costs = {"num_trainable_params": size // 4, "file_size": size, "train_time": 9.0, "accelerator_memory_max": 5e6}
    there = {
        "system_info": {"threads": 1, "name": "cpu"},
        "package_info": {"torch": "2"},
        "dataset_info": {"classes": 5},
    }
    return {
        "run_info": {"method": method, "task": task, "train_config": recipe},
        "train_info": {"status": "success", "metrics": metrics, **costs},
        "meta_info": there,
    }


LINES = [
    line("head", "elpv", 70.0, held_out=200, lr=0.003), line("head", "elpv", 75.0, held_out=200, lr=0.01),
    line("head", "elpv", 80.0, largest=50.0), line("head", "trashnet", 60.0),
    line("norm+head", "elpv", 84.0, 4000, largest=50.0), line("norm+head", "elpv", 86.0, 4000, largest=50.0),
    line("norm+head", "trashnet", 63.0, 4000),
]  # fmt: skip


def test_the_tables_say_what_the_lines_say():
    text = tasks.section(LINES)
    assert "| trashnet | 81.2 | 63.0 | 60.0 |" in text
    assert "| elpv | 82.8 | 85.0 ± 1.4 (2) | 80.0 |" in text
    assert "| elpv, balanced | - | 84.0 ± 1.4 (2) | 79.0 |" in text
    assert "trashnet, balanced" not in text
    assert "| mean of 2 | - | 74.0 | 70.0 |" in text
    assert "+4.0 points against `head`, the mean of 2 tasks (+3.0 to +5.0)" in text
    assert "4.00 times the bytes" in text
    assert "| head | elpv | 0.01 | 0.003: 70.0, 0.01: 75.0 |" in text
    assert "| norm+head | 1 | elpv |" in text
    assert "| norm+head | 2 | trashnet |" in text


def test_the_page_is_written_from_the_lines_that_are_kept():
    lines = tasks.read()
    assert tasks.section(lines).strip() in tasks.PAGE.read_text()
    assert tasks.FIGURE.is_file()
    assert {entry["run_info"]["method"] for entry in lines} <= {*METHODS}
    assert {task for _, task in tasks.grouped(lines)} <= {*tasks.PROBES}
