"""Match a config's targets against the module and parameter paths of a model or a plan."""
