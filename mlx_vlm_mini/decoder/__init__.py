"""Embeddings -> hidden states -> logits."""
