"""The layers that stand where modules stood, and the map of where they can."""
