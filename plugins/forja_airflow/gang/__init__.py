"""One training in several pods: ``jobset`` what the gang is and how it stands, ``operator`` and ``trigger`` Airflow's side."""
