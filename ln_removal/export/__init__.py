"""From a frozen model to one without norms: model classes, the stock form, and the check before anything is written."""
