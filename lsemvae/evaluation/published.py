"""What the paper printed, to be shown beside results of the same task, never among them."""

import pandas as pd

SOURCE = "arXiv 2503.13470v1, Table 2"
COHORTS = {
    "ph": "ASPIRE, 892 recordings, 201 of one class and 691 of the other",
    "post_capillary": "ASPIRE, 691 recordings, 555 of one class and 136 of the other",
    "elevated_pawp": "UK Biobank, 16,416 recordings",
}
"""By task."""
CAUTION = (
    "The paper's cohorts are not those of this report: other patients, other devices, another prevalence and other "
    "folds. The two tables say nothing about which implementation is better."
)

# Task -> method -> AUROC on 12 and on 6 leads; None where the paper prints none.
_AUROC: dict[str, dict[str, tuple[float, float | None]]] = {
    "ph": {
        "ResNet1d": (0.798, 0.763), "xResNet1d": (0.816, 0.796), "beta-VAE": (0.783, None), "ST-MEM": (0.824, 0.793),
        "Multimodal-CNN": (0.681, 0.656), "MVAE": (0.813, 0.805), "MoPoE-VAE": (0.834, 0.787),
        "LS-EMVAE": (0.852, 0.814),
    },
    "post_capillary": {
        "ResNet1d": (0.805, 0.761), "xResNet1d": (0.864, 0.798), "beta-VAE": (0.846, None), "ST-MEM": (0.874, 0.816),
        "Multimodal-CNN": (0.545, 0.554), "MVAE": (0.841, 0.836), "MoPoE-VAE": (0.820, 0.792),
        "LS-EMVAE": (0.890, 0.863),
    },
    "elevated_pawp": {"LS-EMVAE": (0.778, 0.735)},
}  # fmt: skip
# Of LS-EMVAE: (task, leads) -> accuracy and MCC.
_ACCURACY_MCC = {
    ("ph", "6L"): (0.815, 0.412), ("ph", "12L"): (0.822, 0.461),
    ("post_capillary", "6L"): (0.869, 0.544), ("post_capillary", "12L"): (0.855, 0.606),
    ("elevated_pawp", "6L"): (0.682, 0.325), ("elevated_pawp", "12L"): (0.711, 0.389),
}  # fmt: skip


def published(task: str) -> pd.DataFrame | None:
    """leads, method, auroc, accuracy, mcc of the paper's task (means of five folds); None for another task."""
    if task not in _AUROC:
        return None
    lines = []
    for column, leads in ((1, "6L"), (0, "12L")):
        for method, of_leads in _AUROC[task].items():
            accuracy, mcc = _ACCURACY_MCC[task, leads] if method == "LS-EMVAE" else (None, None)
            lines.append((leads, method, of_leads[column], accuracy, mcc))
    table = pd.DataFrame(lines, columns=["leads", "method", "auroc", "accuracy", "mcc"])
    return table.astype(dict.fromkeys(["auroc", "accuracy", "mcc"], float))
