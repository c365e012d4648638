"""Adapters for other runtimes: the formats that runtimes read, how they are served, and rules about their answers."""
