"""BLEU score of the quality suite."""

from __future__ import annotations


def bleu(texts: list[str], references: list[list[str]]) -> float:
    """Corpus BLEU of sacrebleu (tokenization 13a) on raw references.

    Args:
        texts: Generated texts.
        references: References of each text.
    """
    import sacrebleu

    wide = max(map(len, references))
    columns = [[r[j] if j < len(r) else None for r in references] for j in range(wide)]
    return float(sacrebleu.corpus_bleu(texts, columns).score)
