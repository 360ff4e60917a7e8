"""Files that are written whole, and files that are read without trust."""
