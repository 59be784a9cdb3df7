"""RGB pixels -> pixel_values: resized, cut, padded, normalised."""
