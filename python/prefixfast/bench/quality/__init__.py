"""Suite ``quality``: loss, BLEU and training time on E2E, for prefixfast, PEFT and the base without a prefix."""
