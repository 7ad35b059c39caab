"""What workflows/tune.py is made of: what a grid means, and what became of its trials."""
