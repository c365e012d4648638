"""The training loop and its step: optimizers, schedules, loss scaling, progress and signals."""
