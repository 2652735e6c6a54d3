"""Table of the metrics of each task. It imports no metric, so that the command line starts fast."""

from __future__ import annotations

# Metrics of each task, by the task's name, in the order of its official table.
TASK_METRICS: dict[str, tuple[str, ...]] = {
    "e2e": ("bleu", "nist", "meteor", "rouge_l", "cider", "slots", "lengths"),
    "webnlg": ("multi_bleu_lc", "meteor_webnlg", "ter_webnlg", "chrf", "slots", "lengths"),
    "dart": ("multi_bleu", "meteor_dart", "ter", "moverscore", "bertscore", "bleurt", "slots", "lengths"),
    "totto": ("bleu_totto", "bleurt", "lengths"),
    **dict.fromkeys(("xsum", "cnn_dailymail", "samsum", "dialogsum", "summary"), ("rouge", "lengths")),
    "table": ("bleu", "chrf", "slots", "lengths"),
}
