"""GPT-2 and its relatives: where they keep their norms, how they load, attention, precision, our own classes."""
