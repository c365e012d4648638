"""Operations that make adapters from adapters or models: combine, compress, extract, compare."""
