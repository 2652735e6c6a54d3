"""The frozen base model: loading, attaching, output head, packed weights, fingerprint and tokenizer."""
