"""Parameter groups and optimizers that know which tensor is A and which is B."""
