"""Which adapter acts: the state of a model, overrides, recomputations, what is trained."""
