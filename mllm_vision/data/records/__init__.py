"""Tables, folders and archives as rows, and the check of each row."""
