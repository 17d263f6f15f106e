"""All of Forja that imports Airflow: operators, triggers, links and the page that shows a receipt."""
