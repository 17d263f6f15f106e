"""The services of one machine: Kafka, MLflow, Envoy, Triton and Airflow as programs under one supervisor."""
