"""The service: a gateway that speaks OpenAI's protocol, with guards on both sides of the model."""
