"""What is checked before step one: settings, data, memory."""
