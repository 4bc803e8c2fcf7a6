"""Triton kernels. Each file holds kernels and, below them, the function that launches them. Needs triton to import."""
