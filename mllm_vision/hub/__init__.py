"""What is shared: lineage, model card, upload."""
