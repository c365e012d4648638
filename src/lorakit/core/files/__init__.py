"""Adapters on disk: tensor files, tensor names, the adapter's directory with `lorakit.json`, and file inspection."""
