"""Conversations: messages, chat templates, label masks, collation, packing."""
