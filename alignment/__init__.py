"""How the model gets better: records from production, training, scoring and releases."""
