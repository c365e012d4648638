"""Adapters on disk: tensor files, tensor names, adapter directories (including `lorakit.json`), and file inspection."""
