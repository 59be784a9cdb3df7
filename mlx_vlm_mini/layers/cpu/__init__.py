"""What exists because MLX computes slowly on CPUs that are not Apple's."""
