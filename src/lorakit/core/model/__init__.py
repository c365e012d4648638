"""Operations on a whole model: index, activation, checks, ties, vocabulary, fingerprint."""
