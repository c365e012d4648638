"""From a config to an adapter on a model."""
