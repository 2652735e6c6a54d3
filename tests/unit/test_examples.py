"""Scripts in examples/ run and print correct results."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from oracles import ROOT
from prefixfast import Prefix

EXAMPLES = ROOT / "examples"


def run(*arguments: object) -> str:
    env = {
        "PYTHONPATH": str(ROOT / "python"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": str(Path(sys.executable).parent),
        "COLUMNS": "120",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_from_peft(folder, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    )
    model.save_pretrained(tmp_path / "adapter")
    rows = [{"prompt": f"{a} and {b}: ", "completion": "yes sir"} for a in "abc" for b in "xyz"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf8")
    out = run(EXAMPLES / "from_peft.py", folder, tmp_path / "adapter", tmp_path / "rows.jsonl", tmp_path / "new")
    assert "PEFT agrees on both adapters" in out
    before, after = (float(part.split()[0]) for part in out.rsplit("first target: ", 1)[1].split(" before, "))
    assert after > before + 1
    assert PeftConfig.from_pretrained(tmp_path / "new").num_virtual_tokens == 6
    assert Prefix.from_pretrained(tmp_path / "new").digest != Prefix.from_pretrained(tmp_path / "adapter").digest


def test_every_example_is_tested():
    assert {p.name for p in EXAMPLES.glob("*.py")} == {"from_peft.py"}
