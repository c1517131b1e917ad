"""`python -m minigpt` is the console command without installing it."""

from minigpt.cli import main

main()
