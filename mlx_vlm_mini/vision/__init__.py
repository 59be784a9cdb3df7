"""pixel_values -> image features."""
