"""How any player learns: the one loop with its checkpoints, progress and budget, optimisers and schedules, and the
trainings that every paper builds on: on labels (supervised for images, finetuning for sentences) and on a teacher's
logits (kd).

Imports data, losses, taps, banks and what lies below them; knows no method and no model by name.
"""
