"""Image features -> decoder embeddings."""
