"""Attaching adapters to a model, detaching, loading and saving them."""
