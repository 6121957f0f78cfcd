"""The endpoints, by what they make."""
