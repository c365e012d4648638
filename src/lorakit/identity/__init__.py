"""What a module computes: the source that it runs, its digest, and the values that the source depends on."""
