"""What lorakit knows about transformers' models: shapes from configs, default targets. Imports no torch."""
