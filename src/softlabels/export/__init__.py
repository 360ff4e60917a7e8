"""A trained student for others: exported, described, and used on pictures."""
