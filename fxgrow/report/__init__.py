"""What people are shown of models and plans, as plain data, and pictures of it."""
