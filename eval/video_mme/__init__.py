"""Video-MME and the other video benchmarks: data layouts, prompts, answer extraction and scoring as their authors do it."""
