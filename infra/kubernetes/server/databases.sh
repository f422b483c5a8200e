#!/bin/sh
# Runs once, on an empty volume: a role and a database for each of Prefect, MLflow and MLflow's users. The statements hold
# passwords, so they lie in a secret file and reach psql by its standard input, not by its command line.
set -eu
psql --set ON_ERROR_STOP=1 --no-psqlrc --quiet --username "$POSTGRES_USER" --dbname postgres < /run/secrets/postgres_init
