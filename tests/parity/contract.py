"""Packed forward of two texts against the model's own logits, for every family.

test_contract.py runs this script under several versions of transformers.
"""

import sys

import torch
import transformers

import tiny
from prefixfast.attention.plan import plain_plan
from prefixfast.model.load import load
from prefixfast_kernels.tile_selection import Backend

assert transformers.__version__ == sys.argv[1], transformers.__version__
texts = [torch.arange(3, 3 + n) for n in (9, 20)]
for family in tiny.FAMILIES:
    model = tiny.make(family)
    with torch.no_grad():
        expected = torch.cat([model(input_ids=t[None]).logits[0] for t in texts])
        with load(model) as base:
            got = base.forward(plain_plan([len(t) for t in texts], backend=Backend("torch")), torch.cat(texts))
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-5, (family, error)
    print(family, f"{error:.1e}")
