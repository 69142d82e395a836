"""One file per analysis: pure functions from a trace table to a Polars frame, and what each column means."""
