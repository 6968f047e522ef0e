"""A growth in the user's own class: in the living model, or in a larger instance."""
