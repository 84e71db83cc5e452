"""Models and tasks with published reference outputs."""

CASES = [
    ("gpt2-random", "swap1"),
    ("gpt2-random", "swap2"),
    ("llama-random", "swap1"),
    ("llama-random", "swap2"),
    ("neox-random", "swap1"),
    ("neox-random", "swap2"),
    ("trained-gpt2-4l", "ioi"),
    ("trained-gpt2-4l", "sva_rc"),
    ("trained-gpt2-4l", "docstring"),
    ("gemma2-random", "swap2"),
]
