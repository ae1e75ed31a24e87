"""Pack an image data set without loss into parts that travel one by one, and join them where there is no network.

    python recipes/pack_data.py SOURCE OUT [--parts 2]     writes OUT/part-1, OUT/part-2, ...
    python recipes/pack_data.py --join cifar10 OUT/part-1 OUT/part-2

SOURCE is a folder or a Hub id of colour images. They become lossless WebP, unless they are already. Each part holds an
equal share of each split as Parquet files, and the sha256 of all pixels and labels; joining decodes all and compares.
The joined folder is what `dataset=` takes. Name it as the data set, since result lines keep the folder's name.
"""

import argparse
import hashlib
import io
import json
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from bn_affine_adapters.training.data import load_splits


def webp(row: dict[str, Any]) -> dict[str, Any]:
    """Return an encoded image, or the file of one, as lossless WebP."""
    data = row["bytes"] or Path(row["path"]).read_bytes()
    if data[8:12] != b"WEBP":
        encoded = io.BytesIO()
        Image.open(io.BytesIO(data)).convert("RGB").save(encoded, "WEBP", lossless=True, quality=100, method=6)
        data = encoded.getvalue()
    return {"bytes": data, "path": None}


def digests(folder: str) -> dict[str, str]:
    """Return the sha256 of each split's pixels and labels."""
    found = {}
    for name, split in zip(("train", "test"), load_splits(folder), strict=True):
        digest = hashlib.sha256()
        for row in split.dataset:
            image = row[split.image_column].convert("RGB")
            digest.update(f"{image.size} {row[split.label_column]} ".encode() + image.tobytes())
        found[name] = digest.hexdigest()
    return found


def pack(source: str, out: Path, parts: int) -> None:
    """Write the parts of a data set."""
    wanted = digests(source)
    for name, split in zip(wanted, load_splits(source), strict=True):
        columns = [split.image_column, split.label_column]
        rows = split.dataset.cast_column(columns[0], datasets.Image(decode=False))
        features = datasets.Features({column: split.dataset.features[column] for column in columns})
        for index in range(parts):
            images, labels = (rows.shard(parts, index, contiguous=True)[column] for column in columns)
            with ProcessPoolExecutor() as pool:
                images = list(pool.map(webp, images, chunksize=256))
            path = out / f"part-{index + 1}" / "data" / f"{name}-{index:05}-of-{parts:05}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_dict(dict(zip(columns, [images, labels], strict=True)), features).to_parquet(path)
    for part in sorted(out.glob("part-*")):
        (part / "sha256.json").write_text(json.dumps(wanted))
        print(f"{part}: {sum(file.stat().st_size for file in part.rglob('*') if file.is_file()):,} bytes")


def join(out: Path, parts: list[Path]) -> None:
    """Join parts into one folder, and compare what it decodes to."""
    for part in parts:
        shutil.copytree(part, out, dirs_exist_ok=True)
    wanted, found = json.loads((out / "sha256.json").read_text()), digests(str(out))
    if found != wanted:
        sys.exit(f"{out} does not hold what was packed:\n  seen:  {found}\n  do:    join all parts, in an empty folder")
    print(f"{out}: {found}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "paths", type=Path, nargs="+", help="SOURCE OUT; with --join the folder to write, and the parts"
    )
    parser.add_argument("--join", action="store_true")
    parser.add_argument("--parts", type=int, default=2)
    given = parser.parse_args()
    datasets.disable_progress_bars()
    if given.join:
        join(given.paths[0], given.paths[1:])
    else:
        pack(str(given.paths[0]), given.paths[1], given.parts)
