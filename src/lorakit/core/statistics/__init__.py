"""Statistics of a base's inputs and gradients, for inits that need data."""
