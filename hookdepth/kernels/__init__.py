"""Fused kernels for a GPU, where a user asks for them: nothing here is imported on a CPU, or without being asked."""
