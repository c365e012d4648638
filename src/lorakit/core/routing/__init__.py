"""Which adapter acts in a forward, on which rows."""
