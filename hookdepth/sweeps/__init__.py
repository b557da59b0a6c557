"""Sweeps over layers, tokens and heads; and their first order, by one backward pass."""
