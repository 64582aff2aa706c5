"""What an exact resume needs beyond the Trainer's own checkpoints."""
