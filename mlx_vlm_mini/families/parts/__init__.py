"""What several families share: configs, weight maps, conversations."""
