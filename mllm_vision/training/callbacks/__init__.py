"""Trainer callbacks: progress, weight averages, health, finite losses."""
