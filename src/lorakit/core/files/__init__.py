"""An adapter on disk: its tensors and their names, its directory with `lorakit.json`, and findings about the files."""
