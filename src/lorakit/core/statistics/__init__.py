"""Statistics of a base model's inputs and gradients, for data-dependent inits."""
