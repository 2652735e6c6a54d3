"""Table of all metrics."""

from __future__ import annotations

from dataclasses import dataclass

from prefixfast.metrics.bleu import bleu, bleu_totto, multi_bleu, multi_bleu_lc
from prefixfast.metrics.chrf import chrf
from prefixfast.metrics.coco import cider, meteor, rouge_l
from prefixfast.metrics.lengths import SCORES as LENGTHS
from prefixfast.metrics.lengths import lengths
from prefixfast.metrics.meteor_cli import meteor_dart, meteor_webnlg
from prefixfast.metrics.neural import bertscore, bleurt, moverscore
from prefixfast.metrics.nist import nist
from prefixfast.metrics.result import Better, MetricFunction, Score
from prefixfast.metrics.rouge import rouge
from prefixfast.metrics.slots import SCORES as SLOTS
from prefixfast.metrics.slots import slots
from prefixfast.metrics.ter import ter, ter_webnlg


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: Name of the metric, a key of `METRICS`.
        function: Function that computes the scores.
        title: Description with the official script whose numbers the metric gives.
        scores: Scores of ``function``.
    """

    name: str
    function: MetricFunction
    title: str
    scores: tuple[Score, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the scores."""
        return tuple(score.name for score in self.scores)


ALL: tuple[Metric, ...] = (
    Metric("bleu", bleu, "BLEU of mteval-v13a, as E2E's script prints it", (Score("BLEU", "0 to 1"),)),
    Metric("nist", nist, "NIST score of mteval-v13a, as E2E's script prints it", (Score("NIST", "bits"),)),
    Metric("meteor", meteor, "METEOR 1.5 of PTB tokens, as E2E's script prints it", (Score("METEOR", "0 to 1"),)),
    Metric("rouge_l", rouge_l, "ROUGE-L of COCO's captions, as E2E's script prints it", (Score("ROUGE_L", "0 to 1"),)),
    Metric("cider", cider, "CIDEr of COCO's captions, as E2E's script prints it", (Score("CIDEr", "0 to 10"),)),
    Metric(
        "multi_bleu_lc",
        multi_bleu_lc,
        "BLEU of multi-bleu.perl -lc, as WebNLG's script of 2017 prints it",
        (Score("BLEU", "0 to 100"),),
    ),
    Metric(
        "multi_bleu", multi_bleu, "BLEU of multi-bleu.perl, as DART's script prints it", (Score("BLEU", "0 to 100"),)
    ),
    Metric(
        "bleu_totto",
        bleu_totto,
        "BLEU of sacrebleu's command line, as ToTTo's script calls it",
        (Score("BLEU", "0 to 100"),),
    ),
    Metric(
        "rouge",
        rouge,
        "ROUGE with stemmer, as the code of Li & Liang prints it",
        (Score("ROUGE-1", "0 to 100"), Score("ROUGE-2", "0 to 100"), Score("ROUGE-L", "0 to 100")),
    ),
    Metric(
        "meteor_webnlg",
        meteor_webnlg,
        "METEOR 1.5 -l en -norm -r 3, as WebNLG's script of 2017 calls it",
        (Score("METEOR", "0 to 1"),),
    ),
    Metric(
        "meteor_dart",
        meteor_dart,
        "METEOR 1.5 -l en -norm -r 8, as DART's script calls it",
        (Score("METEOR", "0 to 1"),),
    ),
    Metric(
        "ter_webnlg",
        ter_webnlg,
        "TER of Tercom, as WebNLG's script of 2017 computes it",
        (Score("TER", "edits per word", "lower"),),
    ),
    Metric("ter", ter, "TER of Tercom, as DART's script computes it", (Score("TER", "edits per word", "lower"),)),
    Metric(
        "chrf",
        chrf,
        "chrF++ and chrF, as WebNLG's script of 2020 computes them",
        (Score("chrF++", "0 to 1"), Score("chrF", "0 to 1")),
    ),
    Metric("moverscore", moverscore, "MoverScore, as DART's script calls it", (Score("MoverScore", "at most 1"),)),
    Metric("bertscore", bertscore, "F1 of BERTScore, as DART's script calls it", (Score("BERTScore", "at most 1"),)),
    Metric("bleurt", bleurt, "BLEURT, as DART's script calls it", (Score("BLEURT", "about 0 to 1"),)),
    Metric("slots", slots, "Values of the tables that the texts say, leave out, and say of other tables", SLOTS),
    Metric("lengths", lengths, "Mean length, distinct n-grams and share of empty texts", LENGTHS),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in ALL}


def better_side(name: str) -> Better | None:
    """Better side of a score, None if the score has none or is unknown.

    Args:
        name: Name of the score, with or without a subset at its end, for example ``"TER unseen"``.
    """
    scores = (score for metric in ALL for score in metric.scores)
    return next((s.better for s in scores if f"{name} ".startswith(f"{s.name} ")), None)
