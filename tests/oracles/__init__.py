"""Independent references, written from the papers in float64 NumPy; they share no code with the package."""
