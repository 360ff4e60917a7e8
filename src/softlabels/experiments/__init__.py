"""Many runs: comparisons over seeds, searches, the papers' tables, the demo."""
