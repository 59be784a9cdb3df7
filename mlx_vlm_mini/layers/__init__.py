"""What towers and decoders share: attention, MLPs, norms, activations, rotary positions."""
