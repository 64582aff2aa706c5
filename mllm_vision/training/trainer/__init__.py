"""The Hugging Face Trainer with exact gradient caching, evaluation and sharding."""
