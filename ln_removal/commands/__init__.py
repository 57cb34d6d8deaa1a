"""The commands, one file each: they parse, call one library function and print."""
