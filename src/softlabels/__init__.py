"""Better image classifiers from better labels."""
