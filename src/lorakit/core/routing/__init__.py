"""Routes: which adapter is active in a forward, and on which rows."""
