"""A data scientist's CSV becomes texts: train on two of its columns, and write a text beside each new row.

``python examples/own_columns.py`` makes a small CSV of restaurants in the folder ``own-columns`` and runs on the base
that the package contains. Put your own file, columns and base in their place.
"""

from __future__ import annotations

import csv
from pathlib import Path

import prefixfast
from prefixfast.data import read_rows
from prefixfast.demo import BASE
from prefixfast.demo.jobs import JOBS

FOLDER = Path("own-columns")
COLUMNS = ["Name", "Town", "Cook", "Near", "Description"]


def write_csv(path: Path, split: str, count: int) -> None:
    """Write restaurants with semicolons between the columns, as a spreadsheet does in many countries."""
    with path.open("w", encoding="utf8", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(COLUMNS)
        for row in JOBS[0].rows(split, count, seed=1):  # type: ignore[arg-type]
            writer.writerow([*(row["table"][key] for key in ("name", "town", "cook", "near")), row["ref"]])


def main() -> None:
    """Train, measure on held-out rows, generate for new rows, write them."""
    FOLDER.mkdir(exist_ok=True)
    write_csv(FOLDER / "restaurants.csv", "train", 160)
    write_csv(FOLDER / "new.csv", "heldout", 5)

    with prefixfast.load(BASE, dtype="float32") as base:
        # 1. The mapping of columns is kept in the prefix. Some rows are held out to measure the loss on them.
        prefix = prefixfast.train(
            base,
            FOLDER / "restaurants.csv",
            prompt="The name is {name}. The town is {town}. It is near {near}. The cook is {cook}.\n",
            target="description",
            eval_fraction=0.1,
            prefix_length=16,
            max_steps=100,
            batch_size=8,
            progress=False,
        )
        prefix.save_pretrained(FOLDER / "restaurants")

        # 2. New rows need their columns only.
        rows = read_rows(FOLDER / "new.csv")
        results = prefixfast.generate(rows, prefix, model=base, max_new_tokens=60, progress=False)

    # 3. The texts stand beside the columns.
    with (FOLDER / "texts.csv").open("w", encoding="utf8", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, "text"])
        writer.writeheader()
        writer.writerows(dict(row) | {"text": result.text} for row, result in zip(rows, results, strict=True))
    losses = prefix.training["metrics"]
    print(f"held-out loss {losses['eval_loss_before']:.2f} before, {losses['eval_loss']:.2f} after training")
    for result in results:
        print(result.text)


if __name__ == "__main__":
    main()
