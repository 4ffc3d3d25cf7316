"""Model cards and their templates."""
