"""Serve a base and many adapters over HTTP: each reply comes from the named version of the named adapter."""
