"""What data says about a base: collected inputs and gradients, inits and ranks from them."""
