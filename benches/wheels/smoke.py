"""Smoke test of an installed prefixfast: train, save, store, generate and score with a tiny random model.

The file ``tiny.py`` of the tests lies beside this one.
"""

import sys
import tempfile
from pathlib import Path

import prefixfast
import tiny


def main() -> None:
    """Run the smoke test; the exit status is 1 if a result is wrong."""
    base = prefixfast.load(tiny.make("llama"))
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}] * 8
    run = prefixfast.train(
        base, {"a": rows, "b": rows}, init="random", prefix_length=4, max_steps=3, batch_size=2, progress=False
    )
    with tempfile.TemporaryDirectory() as folder:
        store = prefixfast.PrefixStore(Path(folder, "store"))
        for name, prefix in run.items():
            prefix.save_pretrained(Path(folder, name))
            if prefixfast.Prefix.from_pretrained(Path(folder, name)).digest != prefix.digest:
                sys.exit(f"{name}: the prefix read from the folder differs from the saved one")
            store.put(name, prefix)
        with prefixfast.Engine(base, store=store, max_num_seqs=4, max_model_len=64) as engine:
            together = engine.generate([[5, 6], [7]], ["a", "b"], max_new_tokens=6)
            alone = [engine.generate([ids], name, max_new_tokens=6)[0] for ids, name in (([5, 6], "a"), ([7], "b"))]
            if [g.token_ids for g in together] != [g.token_ids for g in alone]:
                sys.exit("a request's tokens depend on its batch")
            score = engine.score([[5, 6]], "a", targets=[[7, 8]])[0]
    result = f"{together[0].token_ids}, log-probability {score.logprob:.3f}"
    print(f"prefixfast {prefixfast.__version__} on {sys.platform}: {result}")


if __name__ == "__main__":
    main()
