"""LS-EMVAE on Ray: find pulmonary hypertension in an ECG.

    import lsemvae
    record = lsemvae.formats.read("recording.hea")          # a file of any format -> Record
    x = lsemvae.preprocess.preprocess([record], lsemvae.LEADS, lsemvae.preprocess.PreprocessConfig())
    score = lsemvae.Scorer("bundle").score([record])[0]     # a trained model's answer: Score

These names are stable. Each is imported when it is first used, so that `import lsemvae` itself is quick.

Array names end with their shape, one letter for each axis, in this order:

    B batch (records)   L leads   T time (samples)   D latent   K experts   F features   C classes

For example, `x_BLT` is a batch of preprocessed recordings and `mu_BKD` holds the means of all experts. Names of
quantities end with their unit: `_hz`, `_s`, `_mv`, `_uv_per_lsb`.

Read these six files first: leads.py, record.py, preprocess, models/lsemvae.py, bundle.py, training/fit.py.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsemvae import formats, preprocess
    from lsemvae.bundle import Score, Scorer
    from lsemvae.errors import LsemvaeError
    from lsemvae.leads import LEADS, LIMB_LEADS
    from lsemvae.record import Record

__version__ = "0.1.0"
__all__ = ["LEADS", "LIMB_LEADS", "LsemvaeError", "Record", "Score", "Scorer", "__version__", "formats", "preprocess"]

_MODULES = {
    "LEADS": "lsemvae.leads",
    "LIMB_LEADS": "lsemvae.leads",
    "LsemvaeError": "lsemvae.errors",
    "Record": "lsemvae.record",
    "Score": "lsemvae.bundle",
    "Scorer": "lsemvae.bundle",
    "formats": "lsemvae.formats",
    "preprocess": "lsemvae.preprocess",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lsemvae' has no attribute {name!r}")
    module = import_module(_MODULES[name])
    return module if module.__name__ == f"lsemvae.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
