"""The room `losses`."""
