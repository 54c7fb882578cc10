"""MLX: a folder that mlx-lm opens, and a runtime of our own that needs only mlx."""
