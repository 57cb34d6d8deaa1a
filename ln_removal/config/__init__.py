"""What a run is asked to do: the recipe, its validation, presets, sweeps and estimates."""
