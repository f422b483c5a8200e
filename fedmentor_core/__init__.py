"""FedMentor's method, with no orchestrator: a whole federated study as plain function calls."""

__version__ = "0.1.0"
