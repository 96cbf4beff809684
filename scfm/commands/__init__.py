"""One file a command, each with `main(argv)` -> exit code; what they share is in `options` and `signals`."""
