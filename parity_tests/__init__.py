"""The proof: numerical agreement of every backend with the float64 oracle."""
