"""From options to result files: in one process or many, stopped and resumed."""
