"""Times of a stage's pod that a gang shares. Nothing here imports Airflow."""

STARTUP_S = 600
"""Seconds from a pod's node to its first process: pulling an image of 9 GB takes minutes."""

GRACE_S = 30
"""Seconds from SIGTERM to SIGKILL: a stage releases its claim meanwhile."""

LOST_S = 60
"""Seconds after which a pod that should be gone by now counts as lost with its node, which nobody else says for certain."""
