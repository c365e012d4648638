"""An adapter on disk: its tensors, their names, its directory with `lorakit.json`, and findings about its content."""
