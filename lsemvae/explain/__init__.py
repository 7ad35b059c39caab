"""Explaining scores: which leads and which waves of a recording a score depends on, and whether that is true.

`explainer.py` explains recordings with a bundle; it calls `attribution.py` and `occlusion.py` (what the score depends
on), `waves.py` (where the waves are) and `shares.py` (the attribution of each lead and wave). `igar.py` computes the
authors' own ratio. `checks.py` tests whether explanations are true by `randomised.py` (random weights) and `removal.py`
(deletion and insertion), `truth.py` on simulated hearts; `cohort.py` summarises many.
"""
