"""Adapters on disk: tensors and their names, the adapter directory with `lorakit.json`, and inspection of the files."""
