"""Pictures from words: image tokens chosen one by one by the decoder, and their pixels."""
