"""One Prefect task per step of a round: retries, limits, MLflow, artifacts. No maths."""
