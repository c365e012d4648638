"""Set-up of a run: from settings to a loaded model with its adapter, data and plan."""
