"""`python -m fasttrain`."""

from __future__ import annotations

import sys

from fasttrain.commands.shared import interrupts_end_at_once, open_closed_streams

if __name__ == "__main__":
    open_closed_streams()
    with interrupts_end_at_once():
        from fasttrain.cli import main
    sys.exit(main())
