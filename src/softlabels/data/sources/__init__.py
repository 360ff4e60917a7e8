"""The data sources, a reader a file; `by_name` opens them."""
