"""The stories: train, promote, roll back; and the command line that starts them. No maths."""
