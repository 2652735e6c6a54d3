"""METEOR 1.5 as the scripts of WebNLG and DART call its command line, with the program that pycocoevalcap contains."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from prefixfast.metrics.forms import Forms, dart_forms, webnlg_forms
from prefixfast.metrics.java import meteor_command, package, running
from prefixfast.metrics.result import MetricUnavailable, MetricValue, References, Scores, Tables, Texts


def meteor_webnlg(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """METEOR of WebNLG's script of 2017 (``-l en -norm -r 3``), on texts in ASCII.

    The first three references of a text count.

    Raises:
        MetricUnavailable: If Java, pycocoevalcap or Unidecode is needed and missing.
    """
    return {"METEOR": _value(webnlg_forms(outputs, references), 3, "texts in WebNLG's form")}


def meteor_dart(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """METEOR of DART's script (``-l en -norm -r 8``).

    The first three references of a text count.

    Raises:
        MetricUnavailable: If Java or pycocoevalcap is missing.
    """
    return {"METEOR": _value(dart_forms(outputs, references), 8, "texts in DART's form")}


def _value(forms: Forms, num_references: int, form: str) -> MetricValue:
    """Score of texts in the form of a script.

    Args:
        forms: Texts and references, one line each.
        num_references: Lines for each text in the file of references, of which some can be empty.
        form: Name of the form.
    """
    lines = [(own + [""] * num_references)[:num_references] for own in forms.references]
    with running("METEOR"), tempfile.TemporaryDirectory() as folder:
        texts, groups = Path(folder) / "outputs.txt", Path(folder) / "references.txt"
        texts.write_text("".join(f"{text}\n" for text in forms.outputs), encoding="utf8", errors="replace")
        groups.write_text("".join(f"{text}\n" for own in lines for text in own), encoding="utf8", errors="replace")
        command = meteor_command(str(texts), str(groups), "-r", str(num_references))
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf8", errors="replace", check=False)
        name, _, score = (done.stdout.strip().splitlines() or [""])[-1].rpartition(":")
        if done.returncode or name != "Final score":
            msg = f"METEOR: java ended with status {done.returncode}: {done.stderr.strip()[-300:] or 'no message'}"
            raise MetricUnavailable(msg)
        value = float(score)
    return MetricValue(value, f"{value:.2f}", f"METEOR 1.5 -l en -norm -r {num_references} of {form}; {package()}")
