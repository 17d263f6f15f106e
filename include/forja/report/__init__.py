"""The report of a run: one page that holds everything in itself, for the lake, MLflow and Airflow."""
