"""Compilation of training and inference graphs. Import from the files; they need torch."""
