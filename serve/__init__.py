"""The online service. Its modules import `ray.serve` as `ray_serve`, so that `serve` always means this folder."""
