"""``python -m paxattn``."""

from paxattn.cli import main

main()
