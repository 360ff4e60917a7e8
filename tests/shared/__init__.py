"""What tests share: networks, data, draws, references and runs."""
