"""Write the files of the pages in this folder: ``python make_files.py FOLDER``.

The rows are drawn from the text of the package's demo, so that its base of 2 million parameters can learn them.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from prefixfast.demo import BASE
from prefixfast.demo.jobs import JOBS, Row

NAMES = """
ada ana ann ben bob cara carl dan dora ed ella eva finn fred gina greta hal hugo ida igor
jan jill joe kai kate lena leo liv lou mara max mia ned nina olga otto paul rosa sam vera
""".split()  # noqa: SIM905
PROMPTS = ("Close the letter.", "Answer the invitation.", "Say where you live.")


def write_csv(path: Path, rows: list[list[str]], *, separator: str = ",", encoding: str = "utf-8") -> None:
    """Write a table with its header in the first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=separator).writerows(rows)


def restaurants(folder: Path) -> None:
    """A spreadsheet's export (semicolons, Windows' encoding, capitals in the header), and new rows without texts."""
    job = JOBS[0]
    header = ["No", "Name", "Town", "Cook", "Near", "Description"]
    known, new = job.rows("train", 600, seed=0), job.rows("heldout", 3, seed=1)
    lines = [[str(i), *row["table"].values(), f"{row['ref']} \N{EN DASH} open daily"] for i, row in enumerate(known, 1)]
    for line in lines[1:]:
        line[-1] = line[-1].removesuffix(" \N{EN DASH} open daily")
    write_csv(folder / "restaurants.csv", [header, *lines], separator=";", encoding="cp1252")
    write_csv(folder / "new.csv", [header[:-1], *([str(i), *row["table"].values()] for i, row in enumerate(new, 601))])


def users(folder: Path) -> None:
    """Forty users' letters, one file each; two files are broken."""
    for i, name in enumerate(NAMES):
        town = JOBS[0].rows("train", len(NAMES), seed=2)[i]["table"]["town"]
        answers = (f"With love, {name.title()}", f"Yes, {name.title()} will come.", f"I live in {town}.")
        write_csv(folder / f"{name}.csv", [["prompt", "completion"], *map(list, zip(PROMPTS, answers, strict=True))])
    (folder / "ned.csv").write_text('prompt,completion\nClose the letter.,"With love\n', encoding="utf-8")
    (folder / "olga.csv").write_text("", encoding="utf-8")


def adapters(folder: Path) -> None:
    """Two adapters of PEFT, each trained for a few steps on rows of a job."""
    import torch
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    kinds = {"invite": (PrefixTuningConfig, JOBS[1], 0.05), "notes": (PromptTuningConfig, JOBS[0], 0.3)}
    for name, (config, job, rate) in kinds.items():
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32),
            config(task_type="CAUSAL_LM", num_virtual_tokens=16),
        )
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        for row in job.rows("train", 240, seed=0):
            prompt = " | ".join(f"{key} : {value}" for key, value in row["table"].items()) + "\n"
            ids = tokenizer(prompt + row["ref"] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
            labels = ids.clone()
            labels[:, : len(tokenizer(prompt)["input_ids"])] = -100
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / name)


def tables(path: Path, rows: list[Row]) -> None:
    """Write rows of a job as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    if not (target / "base").exists():
        (target / "base").symlink_to(BASE)
    restaurants(target)
    users(target / "users")
    adapters(target / "adapters")
    tables(target / "train.jsonl", JOBS[1].rows("train", 300, seed=0))
    tables(target / "dev.jsonl", JOBS[1].rows("heldout", 20, seed=1))
