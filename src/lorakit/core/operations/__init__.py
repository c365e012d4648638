"""Adapters made of adapters, from their factors."""
