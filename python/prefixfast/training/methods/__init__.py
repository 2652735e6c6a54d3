"""Methods of adaptation, one module each, which share rows, order, loop, evaluation and resuming."""
