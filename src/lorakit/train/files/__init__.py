"""Files of a run: its directory, checkpoints, results, model card and trackers."""
