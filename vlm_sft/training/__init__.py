"""What protects and records a run: callbacks, checkpoints, the order of rows, optimizers, reports."""
