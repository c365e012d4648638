"""Operations on a whole model: indexing, activation, checks, weight tying, vocabulary and fingerprints."""
