"""Messages -> text -> token ids."""
