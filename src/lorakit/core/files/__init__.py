"""An adapter on disk: tensors and their names, the directory with `lorakit.json`, findings about the content."""
