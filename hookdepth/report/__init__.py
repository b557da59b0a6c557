"""From results to figures, tables and pages. Nothing here runs a model."""
