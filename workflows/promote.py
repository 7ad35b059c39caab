"""Point an alias of a registered model at a version: by default `champion` at what `candidate` names.

The MLflow UI does the same on the model's page. Serve answers with whatever `champion` names, as soon as it has
loaded and checked it.
"""

from dataclasses import dataclass

from command import run_command

from lsemvae.tracking import CANDIDATE, CHAMPION, promote, shown, tracking_uri


@dataclass(frozen=True)
class Args:
    name: str
    """The registered model, such as ph-6L."""
    source: str = CANDIDATE
    """An alias, or a version's number (to go back, give the number that was printed before)."""
    alias: str = CHAMPION
    """The alias to move."""


def main(args: Args) -> None:
    version, before = promote(args.name, args.source, args.alias)
    was = f"before: version {before}" if before else "before: none"
    print(f"models:/{args.name}@{args.alias} is version {version} ({was}) at {shown(tracking_uri())}")
    if args.alias == CHAMPION:
        print("What serves it follows within 30 s; /readyz says why if it does not.")


if __name__ == "__main__":
    run_command(main, Args)
