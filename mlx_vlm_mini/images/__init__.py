"""A path, URL, array or video -> RGB pixels."""
