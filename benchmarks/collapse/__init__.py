"""Why training with four DCN layers died: `python -m benchmarks.collapse` (docs/dcn-collapse.md)."""
