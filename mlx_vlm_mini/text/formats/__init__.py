"""Tokenizers in other files than tokenizer.json: vocabularies of bytes, ranks, pieces and words."""
