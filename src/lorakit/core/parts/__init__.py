"""What is part of an adapter and no factor: copied modules, biases, rows of embeddings, ties."""
