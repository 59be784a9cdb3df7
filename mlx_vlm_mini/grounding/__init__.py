"""Where a model looks (attention maps), and places that it names (boxes, masks)."""
