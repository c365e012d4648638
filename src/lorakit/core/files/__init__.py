"""An adapter on disk: names, tensors, the file of ours beside them, what fits where."""
