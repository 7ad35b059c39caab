"""What `workflows/score.py` is made of: where recordings come from, and how far it is."""
