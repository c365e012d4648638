"""Routes: which adapters are active in a forward pass, and on which rows."""
