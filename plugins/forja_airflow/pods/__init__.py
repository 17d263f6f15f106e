"""A stage in a pod of its own: ``spec`` what the pod is, ``create`` and ``reason`` its life, the rest is Airflow's side."""
