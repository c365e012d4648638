"""Settings of a run: their table, types, sources and checks, without torch."""
