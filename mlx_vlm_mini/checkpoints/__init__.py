"""A folder or a Hub name -> tensors, files, and a model that is loaded."""
