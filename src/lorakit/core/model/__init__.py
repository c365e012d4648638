"""Operations on a whole model: its index, activation, checks, ties, vocabulary, fingerprint."""
