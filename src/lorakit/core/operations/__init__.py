"""Operations on adapters: combine, compress and compare them, or extract them from fine-tuned models."""
