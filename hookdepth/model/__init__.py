"""A Hugging Face decoder with named sites: how it is read, checked and loaded."""
