"""Who may import whom, and what must never be in the code. CONTRIBUTING.md has the rules in words."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.bare import CORE, HEAVY, bare_environment
from support.session import ROOT

LIBRARY = ROOT / "lsemvae"
FILES = sorted(LIBRARY.rglob("*.py"))
EVERYWHERE = {"numpy", "lsemvae"} | set(sys.stdlib_module_names)

# Libraries that a file may import besides the standard library, numpy and this package. The longest path applies.
MAY_IMPORT = {
    "": set(),
    "record.py": set(),
    "simulate.py": {"scipy"},
    "storage.py": {"pyarrow"},
    "progress.py": {"tqdm"},
    "bundle.py": {"torch", "safetensors"},
    "external.py": {"torch", "safetensors"},
    "tracking.py": {"mlflow"},
    "mlmodel.py": {"mlflow"},
    "mlflow_model.py": {"mlflow", "pandas", "torch"},
    "formats": {"wfdb", "defusedxml", "pydicom", "ecgdatakit"},
    "cohorts": {"pandas", "pyarrow"},
    "cohorts/simulated.py": {"scipy"},
    "preprocess": {"scipy"},
    "preprocess/on_device.py": {"torch"},
    "data/shards.py": {"pyarrow", "ray"},
    "data/feed.py": {"ray"},
    "data/held.py": {"pandas", "pyarrow"},
    "data/ingest.py": {"pandas", "pyarrow", "ray"},
    "data/overlay.py": {"pandas"},
    "data/row_groups.py": {"pyarrow"},
    "models": {"torch"},
    "models/parts/fused.py": {"torch", "triton"},
    "training/batched_heads.py": {"torch"},
    "training/fit.py": {"torch"},
    "training/finetune.py": {"torch"},
    "training/validation.py": {"torch"},
    "training/several.py": {"torch"},
    "training/sharded.py": {"torch"},
    "training/checkpoints.py": {"torch", "safetensors", "ray"},
    "training/failures.py": {"ray"},
    "training/launch.py": {"ray", "torch"},
    "training/out_of_memory.py": {"torch"},
    "training/pretrain.py": {"torch", "ray"},
    "training/resident.py": {"torch"},
    "training/writer.py": {"torch", "ray"},
    "training/search.py": {"ray"},
    "training/trials.py": {"pandas"},
    "evaluation": {"sklearn"},
    "evaluation/abstention.py": {"pandas"},
    "evaluation/classical.py": {"scipy"},
    "evaluation/linear.py": {"sklearn", "torch"},
    "evaluation/embedding.py": {"torch", "ray", "pandas"},
    "evaluation/stored.py": {"ray"},
    "evaluation/significance.py": {"scipy"},
    "evaluation/compare.py": {"pandas"},
    "evaluation/tables.py": {"pandas"},
    "evaluation/published.py": {"pandas"},
    "evaluation/protocol.py": {"torch", "ray", "pandas", "sklearn"},
    "evaluation/cells.py": {"torch", "ray"},
    "evaluation/estimate.py": {"torch"},
    "evaluation/lead_set.py": {"pandas"},
    "evaluation/plan.py": {"pandas"},
    "scoring": {"pyarrow", "pandas"},
    "scoring/explaining.py": {"pyarrow", "torch"},
    "explain": {"torch"},
    "explain/attribution.py": {"torch", "captum"},
    "explain/beats.py": {"scipy"},
    "explain/igar.py": {"scipy"},
    "explain/cohort.py": {"pandas"},
    "explain/checks.py": {"torch", "pandas"},
    "explain/randomised.py": {"torch", "scipy"},
    "explain/truth.py": {"torch", "pandas"},
    "plots/attribution.py": {"matplotlib", "PIL"},
    "plots/median_beat.py": {"matplotlib"},
    "plots/shares.py": {"matplotlib"},
    "plots/curves.py": {"matplotlib", "sklearn"},
    "plots/evaluation.py": {"matplotlib", "sklearn"},
    "reports": {"pyarrow"},
    "reports/evaluation.py": {"pandas"},
    "reports/explanation": {"pandas"},
    "reports/explained.py": {"pandas", "pyarrow"},
    "reports/model_card.py": {"pandas"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_a_file_imports_what_it_may(path: Path):
    relative = str(path.relative_to(LIBRARY))
    rule = max((key for key in MAY_IMPORT if relative.startswith(key)), key=len)
    assert imports(path) <= EVERYWHERE | MAY_IMPORT[rule]


def test_imports_go_only_downwards():
    """The list in CONTRIBUTING.md, from the top floor to the ground, holds for every file."""
    listed = re.findall(r"^\d\. (`.*)", (ROOT / "CONTRIBUTING.md").read_text().split("## Who may")[1], re.MULTILINE)[:9]
    floor = {name: number for number, line in enumerate(listed) for name in re.findall(r"`(\w+)`", line)}
    wrong = []
    for path in FILES:
        own = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("lsemvae", "serve"):
                inside = node.module.split(".")[1:2] or [alias.name for alias in node.names]
                wrong += [f"{path.name} imports {name}" for name in inside if floor.get(name, 9) < floor[own]]
    assert wrong == []


def test_a_model_trains_and_scores_in_a_bare_environment(tmp_path: Path):
    """It needs the six libraries that pyproject.toml names for the core, not Ray, MLflow or other extras."""
    python = bare_environment(tmp_path / "bare", *CORE, source=LIBRARY)
    listed = f"import importlib.util as u; print([n for n in {HEAVY!r} if u.find_spec(n)])"
    done = subprocess.run([python, "-I", "-c", listed], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    program = """
import numpy as np, torch, tempfile
from pathlib import Path
from lsemvae.bundle import Bundle, Scorer, save
from lsemvae.config import OptimConfig
from lsemvae.training.fit import Watcher, fit, make_optimizer
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.models import build
from lsemvae.models.classifier import Classifier
from lsemvae.models.parts.head import Head
from lsemvae.models.lsemvae import LSEMVAEConfig
from lsemvae.preprocess import PreprocessConfig, preprocess
from lsemvae.record import Record
from lsemvae.simulate import EcgParameters, simulate_ecg
rng = np.random.default_rng(0)
records = [
    Record.from_leads(dict(zip(LEADS, simulate_ecg(EcgParameters(severity=b / 4), rng)[0])), 500) for b in range(8)
]
x = preprocess(records, LEADS, PreprocessConfig())
batch = {"x_BLT": torch.from_numpy(x.x_BLT), "lead_mask_BL": torch.from_numpy(x.lead_mask_BL)}
model = build(LSEMVAEConfig(latent=4, channels=(2, 2, 2)), LEADS)
losses = []
optim = OptimConfig(epochs=5, batch_size=8, learning_rate=1e-3)
class Losses(Watcher):
    def on_epoch(self, epoch):
        losses.append(epoch.terms["loss"])
fit(model, make_optimizer(model, optim), optim, lambda epoch: [batch], Losses())
assert losses[-1] < losses[0]
classifier = Classifier.from_encoder(model, LIMB_LEADS, Head(24))
with tempfile.TemporaryDirectory() as folder:
    described = Bundle.of(classifier, PreprocessConfig(), task="ph", threshold=0.5)
    save(described, classifier, Path(folder) / "b")
    assert all(0 < answer.score < 1 for answer in Scorer(Path(folder) / "b").score(records))
"""
    done = subprocess.run([python, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_model_is_measured_with_torch_and_numpy_alone(tmp_path: Path):
    python, path = bare_environment(tmp_path / "bare", "torch", "numpy", source=LIBRARY), tmp_path / "rows.json"
    command = [python, ROOT / "workflows" / "bench.py", "model", "--size", "smoke", "--batch", "4", "--threads", "1"]
    done = subprocess.run(
        [*command, "--rounds", "1", "--json", path],
        cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(path.read_text())
    assert answer["machine"]["torch"] == torch.__version__
    assert {"train step b4", "forward b4"} <= {row["case"] for row in answer["rows"]}
    for row in answer["rows"]:
        assert row.keys() == {"case", "ours", "baseline", "ratio", "unit"}
        better_low = row["unit"] in ("ms", "GiB")
        expected = row["baseline"] / row["ours"] if better_low else row["ours"] / row["baseline"]
        assert row["ratio"] == pytest.approx(expected, rel=1e-7)
        assert row["case"] in done.stdout


@pytest.mark.parametrize("folder", ["lsemvae", "workflows", "serve"])
def test_nothing_is_unpickled_and_the_library_does_not_print(folder: str):
    for path in (ROOT / folder).rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        attributes = {
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        assert not imports(path) & {"pickle", "cloudpickle", "joblib", "dill", "shelve"}, path
        restricted = {"torch.load"} if path == LIBRARY / "external.py" else set()
        assert not (attributes - restricted) & {"torch.load", "torch.save", "np.load", "pd.read_pickle"}, path
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for call in calls:  # tensors and plain values alone
            if ast.unparse(call.func) == "torch.load":
                assert {word.arg: ast.unparse(word.value) for word in call.keywords}["weights_only"] == "True", path
        if folder == "lsemvae" and path != LIBRARY / "cli.py":
            assert "print" not in names, path


def test_importing_the_library_does_no_work():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import lsemvae, lsemvae.leads, lsemvae.record, lsemvae.cli"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "ray", "mlflow", "scipy", "pandas", "pyarrow"}


@pytest.mark.parametrize(
    ("module", "slow"),
    [
        ("promote", {"torch", "scipy", "pandas"}),
        ("ingest", {"torch", "scipy", "sklearn", "matplotlib"}),
        ("lsemvae.data.ingest", {"torch", "scipy"}),  # what the tasks of ingest import
        ("lsemvae.training.pretrain", {"scipy", "sklearn", "matplotlib"}),  # the workers
        ("lsemvae.evaluation.cells", {"scipy", "sklearn", "matplotlib"}),  # the trainings of folds
        ("lsemvae.scoring.parts", {"scipy", "sklearn", "matplotlib"}),  # the actors that score
    ],
)
def test_a_process_imports_what_takes_seconds_only_where_it_needs_it(module: str, slow: set[str]):
    program = f"import sys, {module}; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "workflows")])}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert not set(done.stdout.split()) & (slow | {"ray", "mlflow"})
