"""How any player learns: the one loop with its checkpoints, progress and budget, optimisers and schedules, and the
two trainings that every paper builds on, on labels and on a teacher's logits.

Imports data, losses, taps, banks and what lies below them; knows no method and no model by name.
"""
