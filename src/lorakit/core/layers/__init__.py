"""The modules that carry adapters."""
