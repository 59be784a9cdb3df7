"""What exists because MLX computes slowly on CPUs that are not Apple's. table.py is the way in.

This file imports nothing: blas.py has to be imported before mlx.core is.
"""
