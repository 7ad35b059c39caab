"""Promote a model: point an alias at a version, by default `champion` at the version that `candidate` names.

You can do the same on the model's page in the MLflow UI. The endpoint answers with the new `champion` as soon as it has
loaded and checked it.
"""

from dataclasses import dataclass

from command import run_command

from lsemvae.tracking import CANDIDATE, CHAMPION, promote, shown, tracking_uri


@dataclass(frozen=True)
class Args:
    name: str
    """Name of the registered model, such as ph-6L."""
    source: str = CANDIDATE
    """The version to promote: an alias or a number. To go back, give the previous number, which promote prints."""
    alias: str = CHAMPION
    """The alias to move."""


def main(args: Args) -> None:
    version, before = promote(args.name, args.source, args.alias)
    was = f"before: version {before}" if before else "before: none"
    print(f"models:/{args.name}@{args.alias} is version {version} ({was}) at {shown(tracking_uri())}")
    if args.alias == CHAMPION:
        print("Running endpoints switch to it within 30 s; if one does not, its /readyz gives the reason.")
    print(f"next: python workflows/score.py --model models:/{args.name}@{args.alias} --data … --output …")


if __name__ == "__main__":
    run_command(main, Args)
