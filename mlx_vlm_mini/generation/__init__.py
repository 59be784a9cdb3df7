"""Prefill, decoding, caches, streams of answers, chat."""
