"""LS-EMVAE on Ray: find pulmonary hypertension in an ECG.

Array names end with their shape, one letter for each axis, in this order:

    B batch (records)   L leads   T time (samples)   D latent   K experts   F features   C classes

For example, `x_BLT` is a batch of preprocessed recordings and `mu_BKD` holds the means of all experts. Names of
quantities end with their unit: `_hz`, `_s`, `_mv`, `_uv_per_lsb`.

Read these six files first: leads.py, record.py, preprocess, models/lsemvae.py, bundle.py, training/fit.py.
"""

__version__ = "0.1.0"
