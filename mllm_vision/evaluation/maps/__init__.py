"""What an encoder looks at: component maps and attention maps as images."""
