"""The oracle: the forward pass in NumPy, float64. Slow, plain, and what every other backend is measured against."""
