"""The online service. `ray.serve` is imported as `ray_serve` here, so that `serve` means this folder."""
