"""The whole stack on one machine, without containers: servers, work pools, workers, deployments."""
