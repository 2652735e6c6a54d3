"""The demo: a small base language model made here, and three jobs that three prefixes learn on top of it."""
