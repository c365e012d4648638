"""Reads run folders only: rows, records, plots. Knows nothing about models or training."""
