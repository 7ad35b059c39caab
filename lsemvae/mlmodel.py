"""What makes a bundle an MLflow model: the files that a registered version holds beside the bundle's two.

`MLmodel` names `mlflow_model.py`, whose code loads the bundle (MLflow calls this "models from code"). Nothing is
pickled. `tracking.download` never fetches these files.
"""

import json
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from lsemvae import __version__
from lsemvae.bundle import CONFIG, WEIGHTS, Bundle, example_record

MLMODEL, CODE, REQUIREMENTS, ENVIRONMENT = "MLmodel", "mlflow_model.py", "requirements.txt", "python_env.yaml"
EXAMPLE, SERVING_EXAMPLE = "input_example.json", "serving_input_example.json"
WRITTEN_BY_MLFLOW = "registered_model_meta"
"""MLflow's `load_model` writes it into the version itself where the artefacts are a local folder."""
FILES = frozenset(
    {CONFIG, WEIGHTS, MLMODEL, CODE, REQUIREMENTS, ENVIRONMENT, EXAMPLE, SERVING_EXAMPLE, WRITTEN_BY_MLFLOW}
)
"""All that a version may hold."""

PACKAGES = ("mlflow", "numpy", "pandas", "safetensors", "scipy", "torch")
"""What `mlflow_model.py` and the modules that it loads import."""
EXAMPLE_RATE_HZ = 100.0


def write_model(bundle: Bundle, folder: Path) -> None:
    """Write the files that belong beside this bundle into the folder."""
    import mlflow.pyfunc
    from mlflow.models import Model

    example = _example(bundle)
    (folder / EXAMPLE).write_text(json.dumps(example))
    (folder / SERVING_EXAMPLE).write_text(json.dumps({"dataframe_split": example}))
    shutil.copyfile(Path(__file__).with_name(CODE), folder / CODE)
    (folder / REQUIREMENTS).write_text(_requirements())
    (folder / ENVIRONMENT).write_text(
        f"python: {platform.python_version()}\nbuild_dependencies:\n- pip\ndependencies:\n- -r {REQUIREMENTS}\n"
    )
    about = {
        "artifact_path": EXAMPLE,
        "serving_input_path": SERVING_EXAMPLE,
        "type": "dataframe",
        "pandas_orient": "split",
    }
    described = {"lsemvae": __version__, "digest": bundle.digest, "task": bundle.task, "threshold": bundle.threshold}
    model = Model(signature=_signature(bundle), saved_input_example_info=about, metadata=described)
    mlflow.pyfunc.add_to_model(
        model,
        loader_module="mlflow.pyfunc.loaders.code_model",
        python_env=ENVIRONMENT,
        model_code_path=CODE,
        streamable=False,
    )
    model.save(folder / MLMODEL)


def _signature(bundle: Bundle) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Schema

    leads = [ColSpec(Array(DataType.double), lead, required=False) for lead in bundle.leads]
    if bundle.task:
        found = [ColSpec(DataType.double, name) for name in ("score", "probability", "threshold")]
    else:
        found = [ColSpec(Array(DataType.double), "embedding")]
    texts = [ColSpec(DataType.string, "refused"), ColSpec(DataType.string, "reason")]
    return ModelSignature(Schema([*leads, ColSpec(DataType.double, "rate_hz")]), Schema([*found, *texts]))


def _example(bundle: Bundle) -> dict[str, Any]:
    """One recording as MLflow keeps a data frame; at 100 Hz and to 0.001 mV, since MLflow's page shows it."""
    record = example_record()
    step = int(record.rate_hz / EXAMPLE_RATE_HZ)
    signal_mv_LT = np.round(record.signal_for(bundle.leads)[:, ::step].astype(np.float64), 3)
    return {"columns": [*bundle.leads, "rate_hz"], "data": [[*signal_mv_LT.tolist(), EXAMPLE_RATE_HZ]]}


def _requirements() -> str:
    """The versions that are installed here. lsemvae is not among them: no package index has it."""
    lines = [f"# and lsemvae {__version__}, from its repository or your own wheel: it is on no package index"]
    # "2.13.0+cpu" is a build of 2.13.0 that other machines need not have.
    lines += [f"{name}=={metadata.version(name).partition('+')[0]}" for name in PACKAGES]
    return "\n".join(lines) + "\n"
