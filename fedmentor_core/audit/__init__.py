"""An empirical privacy audit: does what the code does keep what the ledger says? See the modules."""
