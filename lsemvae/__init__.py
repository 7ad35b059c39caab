"""LS-EMVAE on Ray: find pulmonary hypertension in an ECG.

Array names carry their shape, in this order and with these letters:

    B batch (records)   L leads   T time (samples)   D latent   K experts   F features   C classes

so `x_BLT` is a batch of preprocessed recordings and `mu_BKD` the means of every expert. Names carry
units where they have one: `_hz`, `_s`, `_mv`, `_uv_per_lsb`.

Read these six files first: leads.py, record.py, preprocess, models/lsemvae.py, bundle.py, training/fit.py.
"""

__version__ = "0.1.0"
