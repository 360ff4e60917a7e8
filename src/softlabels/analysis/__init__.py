"""Numbers from a network's answers: calibration, Zipf's law, features, soft labels."""
