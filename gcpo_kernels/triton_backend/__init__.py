"""Triton kernels. Each file holds kernels and, below them, the functions that launch them (those of the token loss
are in a file of their own). Needs triton to import."""
