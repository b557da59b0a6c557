"""Branches become forward passes, and forward passes become numbers. Nothing here knows an analysis."""
