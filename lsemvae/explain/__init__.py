"""Explaining scores: which leads and which waves of a recording a score depends on, and whether that is true.

`explainer.py` explains recordings with a bundle. It calls `attribution.py` and `occlusion.py` (what the score depends
on), `reference.py` (what recordings are compared with), `waves.py` (where the waves are), `shares.py` (the attribution
of each lead and wave) and `experts.py` (the weights of leads in a model that fuses them). `igar.py` computes the
authors' own ratio. `checks.py` tests whether explanations are true by `randomised.py` (random weights) and `removal.py`
(deletion and insertion), `truth.py` on simulated hearts; `cohort.py` summarises many.
"""
