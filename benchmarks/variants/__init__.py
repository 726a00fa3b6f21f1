"""Which deformable layers are worth their cost: `python -m benchmarks.variants` (docs/results.md has what came out)."""
