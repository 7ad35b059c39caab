"""Classifiers for the cases that look at explanations: trained on given recordings, with their labels or shuffled."""

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lsemvae.leads import LEADS
from lsemvae.preprocess import PreprocessConfig
from lsemvae.training.finetune import Inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a classifier is trained."""
    parser.add_argument("--encoder", help="a pre-trained bundle; without one, untrained encoders of --size")
    parser.add_argument("--size", default="cpu", choices=("cpu", "small", "smoke"))
    parser.add_argument("--trains", default="linear", choices=("linear", "all"), help="the head alone, or all weights")
    parser.add_argument("--features", default="means", choices=("means", "pooled"), help="what a head alone reads")
    parser.add_argument("--epochs", type=int, default=12, help="of all weights")


def shuffled(data: Inputs, seed: int) -> Inputs:
    """The same recordings with their labels in random order."""
    return replace(data, y_B=np.random.default_rng(seed).permutation(data.y_B))


def encoder_of(args: argparse.Namespace) -> tuple[Any, PreprocessConfig]:
    """The encoder and its preprocessing."""
    from lsemvae.evaluation.embedding import load_encoder
    from lsemvae.models import build
    from lsemvae.recipes import PRETRAIN

    if args.encoder:
        found = load_encoder(args.encoder, LEADS)
        return found.model, found.preprocess
    torch.manual_seed(0)
    recipe = PRETRAIN[args.size]
    return build(recipe.model, LEADS).eval(), recipe.preprocess


def classifier(args: argparse.Namespace, encoder: Any, data: Inputs) -> Any:
    """The classifier, trained as the options say, in evaluation mode on the device."""
    from lsemvae.evaluation.linear import train_linear
    from lsemvae.models.classifier import Classifier
    from lsemvae.recipes import FINETUNE
    from lsemvae.training.finetune import new_head, train_all

    if args.trains == "all":
        recipe = replace(FINETUNE["cpu"], optim=replace(FINETUNE["cpu"].optim, epochs=args.epochs))
        head = new_head(encoder.embedder(LEADS).embedding_size, data.y_B, recipe)
        start = Classifier.from_encoder(encoder, LEADS, head, shifts=recipe.shifts)
        return train_all(start, data, recipe, device=args.device).to(args.device)
    embedder = encoder.embedder(LEADS, args.features).eval()
    with torch.inference_mode():
        batches = zip(*(torch.from_numpy(values).split(64) for values in (data.x_BLT, data.lead_mask_BL)), strict=True)
        pairs = [(embedder.embed(x, mask), embedder.observed(mask)) for x, mask in batches]
    h_BF, observed_BF = (torch.cat(parts).numpy() for parts in zip(*pairs, strict=True))
    recipe = replace(FINETUNE["linear"], strengths=(1e-3, 1e-2), inner_folds=3)
    head = train_linear(h_BF, observed_BF, data.y_B, np.arange(len(data.y_B)).astype(str), recipe)
    return Classifier.from_encoder(encoder, LEADS, head, args.features).eval().to(args.device)


def auroc(model: Any, data: Inputs, device: str) -> float:
    """AUROC on these recordings."""
    from sklearn.metrics import roc_auc_score

    from lsemvae.explain.attribution import logits

    x_BLT, mask_BL = (torch.from_numpy(values).to(device) for values in (data.x_BLT, data.lead_mask_BL))
    return float(roc_auc_score(data.y_B, logits(model, x_BLT, mask_BL)))
