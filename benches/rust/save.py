"""Write the results of the last `cargo bench` to a file: ``python benches/rust/save.py OUT.json``.

The results are medians and their 95 % intervals in microseconds.
"""

import argparse
import json
from pathlib import Path

from prefixfast.io.atomic import replace_file
from prefixfast.io.environment import environment


def main() -> None:
    """Read criterion's estimates and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="file to write")
    args = parser.parse_args()
    found = {}
    for file in sorted((Path(__file__).parents[2] / "target" / "criterion").glob("*/new/estimates.json")):
        median = json.loads(file.read_text(encoding="utf8"))["median"]
        interval = median["confidence_interval"]
        found[file.parents[1].name] = [
            round(ns / 1e3, 1) for ns in (median["point_estimate"], interval["lower_bound"], interval["upper_bound"])
        ]
    result = {"command": "cargo bench", "environment": environment(), "microseconds": found}
    replace_file(args.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
