"""Any table, folder or archive to rows, and the judgement of each row."""
