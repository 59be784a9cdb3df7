"""The modules that draw, which a model that draws has besides those that answer."""
